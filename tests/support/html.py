"""The elements and texts of an HTML page."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "input"}


class Reader(HTMLParser):
    """The elements of a page: which there are, those open around each text, and every attribute."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.texts: list[tuple[list[str], str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        kinds = [attributes.get("class") or attributes.get("id") or tag for tag, attributes in self.open]
        self.texts.append((kinds, data))

    def within(self, *kinds: str) -> str:
        """All texts within elements of these classes, names or tags, outermost first."""
        return "".join(text for open, text in self.texts if [k for k in open if k in kinds] == list(kinds))
