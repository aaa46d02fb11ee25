"""Builds the documentation site: `make docs`, or `python dev/site.py [FOLDER]`.

The pages are the Markdown files of the repository, whose links work on a repository page. This collects them in
`FOLDER/pages`, turns their links into those of a site (a file that is no page is linked at REPOSITORY, an environment
variable, or named without a link), adds pages of the public names, and has zensical build `FOLDER/site` from them in
strict mode: a broken link or a page that is in no menu is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent

MENU: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Start",
        (
            ("Overview", "README.md"),
            ("Tutorial", "docs/tutorial.md"),
            ("Questions", "docs/questions.md"),
            ("Coming from TRL", "docs/migrating-from-trl.md"),
        ),
    ),
    (
        "Use",
        (
            ("Checks before a run", "docs/doctor.md"),
            ("A run and its folder", "docs/runs.md"),
            ("Data", "docs/data.md"),
            ("Models", "docs/models.md"),
            ("Teachers", "docs/teachers.md"),
            ("A teacher on a server", "docs/served-teacher.md"),
            ("A cache of a teacher", "docs/teacher-cache.md"),
            ("Rollout engines", "docs/engines.md"),
            ("Conversations", "docs/conversations.md"),
            ("Scale", "docs/scale.md"),
        ),
    ),
    (
        "Understand",
        (
            ("Method", "docs/method.md"),
            ("Architecture", "docs/architecture.md"),
            ("Contract of objectives", "docs/contract.md"),
            ("Evidence", "docs/evidence.md"),
            ("Objectives measured", "benchmarks/results/objectives.md"),
            ("Informed teachers measured", "benchmarks/results/informed.md"),
        ),
    ),
    (
        "Extend",
        (
            ("Extension points", "docs/extending.md"),
            ("Contributing", "CONTRIBUTING.md"),
            ("Log", "dev/LOG.md"),
        ),
    ),
)
API = (
    ("Running", "api/running.md", ("distill", "Recipe", "Term", "Config")),
    ("Data", "api/data.md", ("Prompt", "load_prompts", "load_task")),
    (
        "Models and text",
        "api/models.md",
        ("load_model", "Vocabulary", "TokenizedText", "Alignment", "align_tokens"),
    ),
    (
        "Teachers",
        "api/teachers.md",
        ("Teachers", "LocalTeacher", "ServedTeacher", "CachedTeacher", "SelfTeacher"),
    ),
    ("Engines", "api/engines.md", ("VLLMEngine",)),
    ("Errors", "api/errors.md", ("GoldError",)),
)
"""Menu entry, page, and public names of each page of the API; the page of errors has all of them."""

_LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """The place of each page in the site, by its path in the repository."""
    found = {path: path for _, entries in MENU for _, path in entries}
    return {path: place.removeprefix("docs/") for path, place in found.items()} | {"README.md": "index.md"}


def rewritten(text: str, path: str, places: dict[str, str], repository: str, folder: Path) -> str:
    """A page's text with the links of the site; pictures are copied to ``folder``."""

    def link(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        if urlsplit(target).scheme or target.startswith("#"):
            return found[0]
        file, _, anchor = target.partition("#")
        there = os.path.normpath(Path(path).parent / file)
        if not (ROOT / there).exists():
            raise SystemExit(f"{path}: links to {target}, which does not exist")
        here = Path(places[path]).parent
        if picture:
            (folder / there).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / there, folder / there)
            return f"![{label}]({os.path.relpath(there, here)})"
        if there in places:
            return f"[{label}]({os.path.relpath(places[there], here)}{f'#{anchor}' if anchor else ''})"
        return f"[{label}]({repository}/{there})" if repository else label

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def api_pages() -> Iterator[tuple[str, str]]:
    """Place and text of each page of public names."""
    import gold

    errors = tuple(name for name in gold.__all__ if name.endswith("Error") and name != "GoldError")
    left = set(gold.__all__) - {"__version__"}
    for title, place, names in API:
        chosen = (*names, *errors) if "GoldError" in names else names
        left -= set(chosen)
        lines = [f"# {title}", ""]
        for name in chosen:
            module = gold._MODULE_OF.get(name, "gold.errors")
            lines += [f"::: {module}.{name}", ""]
        yield place, "\n".join(lines)
    if left:
        raise SystemExit(f"public names in no page of the API: {', '.join(sorted(left))}")


def write_pages(folder: Path, repository: str) -> None:
    """Writes all pages and their pictures."""
    places = pages()
    unlisted = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - places.keys()
    if unlisted:
        raise SystemExit(f"pages in no menu: {', '.join(sorted(unlisted))}")
    for path, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / path).read_text(encoding="utf-8")
        (folder / place).write_text(rewritten(text, path, places, repository, folder), encoding="utf-8")
    for place, text in api_pages():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")


def configuration(repository: str) -> str:
    """The zensical.toml of the site."""
    places = pages()
    menu = [(title, [(name, places[path]) for name, path in entries]) for title, entries in MENU]
    menu.append(("API", [(name, place) for name, place, _ in API]))
    nav = ",\n  ".join(
        f'{{"{title}" = [{", ".join(f"{{{_quoted(name)} = {_quoted(place)}}}" for name, place in entries)}]}}'
        for title, entries in menu
    )
    settings = (ROOT / "dev" / "site.toml").read_text(encoding="utf-8").replace('"ROOT"', _quoted(str(ROOT)))
    where = f'repo_url = "{repository}"\n' if repository else ""
    return settings.replace("[project]\n", f"[project]\n{where}nav = [\n  {nav},\n]\n", 1)


def _quoted(text: str) -> str:
    return f'"{text}"'


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()
    repository = os.environ.get("REPOSITORY", "").rstrip("/")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pages").mkdir(parents=True)
    write_pages(folder / "pages", repository)
    (folder / "zensical.toml").write_text(configuration(repository), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, check=False)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
