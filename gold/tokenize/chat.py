"""Token ids of prompts: plain text after BOS, or messages in the model's chat template.

User input is text. Where a message contains the string of a special token, that string is tokenized as text, never as
the special token: otherwise a prompt could end its own turn. "Special" means that the tokenizer marks the token as
special; other added tokens (`<think>` in some families) are matched in messages as they are in completions. For
special tokens that a model itself generates, such as `<think>` in other families, see `gold.tokenize.markers`.

Completions are tokenized separately from their prompts, by each model's own tokenizer.

`tokenizer` is any object with the interface of a Hugging Face tokenizer.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from gold.data import Message, Prompt
from gold.errors import DataError
from gold.tokenize.templates import Rendering, rendered, template_of
from gold.turns import TurnPrompt, texts_outside_content

# Without a chat template, a conversation becomes a plain transcript with one blank line between turns; the completion
# follows "Assistant:". System and developer messages come first, without a name.
_TRANSCRIPT_NAMES = {
    "user": "User: ",
    "assistant": "Assistant: ",
    "tool": "Tool: ",
    "system": "",
    "developer": "",
}


def prompt_ids(tokenizer: Any, prompt: Prompt, rendering: Rendering | None = None) -> list[int]:
    """The ids of a prompt, with at most one BOS at the start.

    A text follows BOS if the tokenizer adds BOS to texts. Messages are rendered with the tokenizer's chat template and
    its generation prompt; without a template they become a plain transcript.

    Raises:
        DataError: the template rejects the messages, or a message contains the string of a special token and the
            template changes it in a way that cannot be tracked.
    """
    if isinstance(prompt, TurnPrompt):
        from gold.tokenize.conversation import turn_prompt_ids

        return turn_prompt_ids(tokenizer, prompt, rendering)
    if prompt.messages is None or not has_chat_template(tokenizer):
        return transcript_ids(tokenizer, prompt_text(prompt))
    text, form = encodable(
        tokenizer,
        prompt.messages,
        lambda messages: rendered(tokenizer, messages, rendering, add_generation_prompt=True),
    )
    return with_one_bos(tokenizer, form.ids(text))


def transcript_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, after BOS if the tokenizer adds one to texts."""
    return [*([tokenizer.bos_token_id] if adds_bos(tokenizer) else []), *text_ids(tokenizer, text)]


def with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids of a rendered template, with at most one BOS at the start."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def prompt_text(prompt: Prompt) -> str:
    """The prompt as text, for logs and for models without a chat template: its text, or a plain transcript."""
    if prompt.messages is None:
        return prompt.text or ""
    turns = [_TRANSCRIPT_NAMES[message["role"]] + message["content"].strip() for message in prompt.messages]
    return "\n\n".join([*(turn for turn in turns if turn), "Assistant:"])


def starts_text(prompt: Prompt) -> bool:
    """True if the completion of a prompt is tokenized as a new text; some tokenizers add a space before it (Llama-2).

    It is after messages: the templates of such models leave that space to the tokenizer ("[/INST]", then "▁Yes"). After
    a plain text the completion continues the text, and a leading space is one that the model generated.
    """
    return prompt.messages is not None and not (isinstance(prompt, TurnPrompt) and prompt.begun is not None)


def has_chat_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return template_of(tokenizer) is not None


def specials_in(tokenizer: Any, prompt: Prompt) -> list[str]:
    """The special tokens whose strings occur in a prompt, each once, in order."""
    texts = [prompt.text or ""] if prompt.messages is None else [m["content"] for m in prompt.messages]
    return special_strings(tokenizer, texts)


def special_strings(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The special tokens whose strings occur in texts, each once, in order."""
    pattern = _special(tokenizer).pattern
    return list(dict.fromkeys(found.group() for text in texts for found in pattern.finditer(text)))


def dropped_roles(
    tokenizer: Any, messages: Sequence[Message], rendering: Rendering | None = None
) -> list[int]:
    """The indices of the messages that a tokenizer's template always omits; empty without a template.

    Each content is replaced by a marker that no template contains, so that a short content is not found by chance.

    Raises:
        DataError: the template rejects these messages.
    """
    if not has_chat_template(tokenizer):
        return []
    text = rendered(tokenizer, _marked(messages), rendering, add_generation_prompt=True)
    return [place for place in range(len(messages)) if _mark(place) not in text]


def adds_bos(tokenizer: Any) -> bool:
    """True if the tokenizer puts BOS in front of plain texts, by itself or because of its settings.

    Having a BOS token is not enough: some tokenizers name one that the model never saw in front of a text.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    if getattr(tokenizer, "add_bos_token", None) is True:
        return True
    return list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]


@dataclass
class _Special:
    """The special tokens of a tokenizer; `size` shows whether tokens were added since."""

    size: int
    id_of: dict[str, int]
    pattern: re.Pattern[str]
    unknown: int | None
    guard: "_Guard | None" = None

    def in_ids(self, ids: Sequence[int]) -> bool:
        """True if the ids contain special tokens other than the unknown token, which covers text."""
        return not (set(self.id_of.values()) - {self.unknown}).isdisjoint(ids)


class PlainText:
    """Encodes rendered text as it is."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """The ids of a part of the text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def plain(self, text: str) -> str:
        """A part of the text as the template wrote it."""
        return text


class _Guard(PlainText):
    """A copy of a fast tokenizer that matches a placeholder for each special token, and no special tokens."""

    def __init__(self, tokenizer: Any, special: _Special) -> None:
        original = getattr(tokenizer, "backend_tokenizer", None)
        if original is None:
            raise _UnfollowedTemplateError("this kind of tokenizer always reads it as one")
        self._special = special
        self._backend = copy.deepcopy(original)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.stand_in_of = {text: chr(0x100000 + place) for place, text in enumerate(special.id_of)}
        added = self._backend.get_added_tokens_decoder()
        tokens = {text: added.get(i, AddedToken(text, normalized=False)) for text, i in special.id_of.items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        self._backend.add_tokens(
            [
                AddedToken(
                    self.stand_in_of[text], special=False, **{flag: getattr(t, flag) for flag in flags}
                )
                for text, t in tokens.items()
            ]
        )
        self._id_of = {
            self._backend.token_to_id(self.stand_in_of[text]): index for text, index in special.id_of.items()
        }

    def ids(self, text: str) -> list[int]:
        """See ``PlainText.ids``; each placeholder counts as its special token."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._special.in_ids(ids):
            raise _UnfollowedTemplateError("the tokenizer always reads it as one")
        return [self._id_of.get(index, index) for index in ids]

    def plain(self, text: str) -> str:
        """A part of the text as the template wrote it, without placeholders."""
        for special, stand_in in self.stand_in_of.items():
            text = text.replace(stand_in, special)
        return text


class _UnfollowedTemplateError(Exception):
    """The placeholders cannot track this template or tokenizer; the message completes a sentence."""


_SPECIAL: "WeakKeyDictionary[Any, _Special]" = WeakKeyDictionary()


def _special(tokenizer: Any) -> _Special:
    size = len(tokenizer)
    known = _SPECIAL.get(tokenizer)
    if known is not None and known.size == size:
        return known
    id_of = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text in tokenizer.all_special_tokens:
        id_of.setdefault(str(text), int(tokenizer.convert_tokens_to_ids(str(text))))
    id_of.pop("", None)
    # Leftmost, then longest, as tokenizers match them.
    texts = sorted(id_of, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")
    special = _SPECIAL[tokenizer] = _Special(size, id_of, pattern, tokenizer.unk_token_id)
    return special


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, strings of special tokens as text, nothing added."""
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    special = _special(tokenizer)
    if special.in_ids(ids):
        found = special.pattern.search(text)
        shown = f" {found.group()!r}" if found else ""
        raise DataError(
            f"the prompt contains a special token{shown} that the tokenizer cannot keep as text; remove it"
        )
    return ids


def encodable(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> tuple[str, PlainText]:
    """A rendered conversation, and what encodes it, or parts of it; special tokens count only where the template itself
    wrote them.

    If a message contains the string of one, the template is rendered a second time with a marker in place of each
    content: the text between markers comes from the template. There its special tokens are replaced by placeholders,
    which a copy of the tokenizer knows as ordinary added tokens, with special tokens disabled. One pass of that
    tokenizer then treats everything as usual, and contents that look like special tokens as text.

    Raises:
        DataError: the template rejects the messages, or changes such a message in a way that cannot be tracked.
    """
    pattern = _special(tokenizer).pattern
    found = [(i, match) for i, m in enumerate(messages) if (match := pattern.search(m["content"]))]
    for place, message in enumerate(messages):
        if outside := pattern.search(texts_outside_content(message)):
            raise DataError(
                f"messages[{place}] contains {outside.group()!r}, a special token of the model, in its thinking or its "
                "tool calls, where it cannot be kept as text; remove it"
            )
    if not found:
        return render(messages), PlainText(tokenizer)
    plain = [{**message, "content": pattern.sub("x", message["content"])} for message in messages]
    try:
        text, guard = _guarded(tokenizer, messages, render)
        # Compare with the usual path, on the same messages without the strings of special tokens.
        usual = PlainText(tokenizer).ids(render(plain))
        if guard.ids(_guarded(tokenizer, plain, render)[0]) != usual:
            raise _UnfollowedTemplateError("the tokenizer treats its special tokens in an unusual way")
        guard.ids(text)
    except _UnfollowedTemplateError as error:
        place, match = found[0]
        raise DataError(
            f"messages[{place}] contains {match.group()!r}, a special token of the model that cannot be kept as text "
            f"here, because {error}; remove it from the message"
        ) from error
    return text, guard


def _mark(place: int) -> str:
    """A marker for the content of a message: private-use characters have no case and occur in no template."""
    return "\uf8e0" + "".join(chr(0xE000 + byte) for byte in place.to_bytes(4, "big")) + "\uf8e1"


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": _mark(place)}
        if message["content"] and not PLACEHOLDER.search(message["content"])
        else dict(message)
        for place, message in enumerate(messages)
    ]


PLACEHOLDER = re.compile("[\uf8e2-\uf8e6][^\uf8e3]*\uf8e3")
"""Stands for what the student sampled; see ``gold.tokenize.conversation``."""


def _guarded(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> tuple[str, _Guard]:
    text = render(messages)
    if re.search("[\ue000-\uf8ff\U00100000-\U0010fffd]", PLACEHOLDER.sub("", text)):
        raise _UnfollowedTemplateError("private-use characters stand beside it")
    contents = {_mark(place): message["content"] for place, message in enumerate(messages)}
    parts = re.split("(\uf8e0[^\uf8e1]*\uf8e1)", render(_marked(messages)))
    # Many templates strip the white space around contents.
    choices = [[contents[p], contents[p].strip()] if p in contents else [p] for p in parts]
    pattern = "".join("(" + "|".join(map(re.escape, texts)) + ")" for texts in choices)
    match = re.fullmatch(pattern, text)
    if match is None:
        raise _UnfollowedTemplateError("the model's chat template changes the message")

    special = _special(tokenizer)
    guard = special.guard = special.guard or _Guard(tokenizer, special)
    guarded = "".join(
        found
        if part in contents
        else special.pattern.sub(lambda token: guard.stand_in_of[token.group()], found)
        for part, found in zip(parts, match.groups(), strict=True)
    )
    return guarded, guard
