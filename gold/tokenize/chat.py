"""Prompts as the ids that a model reads: plain text after its BOS, or messages in its own chat template.

What a user wrote is text. Where a message contains the text of a special token, the ids of that text are used, never
the token: otherwise a prompt could end its own turn. "Special" are the tokens that the tokenizer declares so; other
added tokens (`<think>` of some families) are part of a message's vocabulary, as they are in a completion's. For special
tokens that a model itself writes, such as the `<think>` of other families, see `gold.tokenize.markers`.

A completion is tokenised apart from its prompt, by each model in its own tokens.

The tokenizer is any object with the interface of a Hugging Face tokenizer.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from gold.data import Message, Prompt
from gold.errors import DataError
from gold.tokenize.templates import Rendering, rendered, template_of

# A model without a chat template reads a conversation as this plain transcript, one blank line between the turns; the
# completion follows "Assistant:". System and developer messages come first, without a name.
_TRANSCRIPT_NAMES = {
    "user": "User: ",
    "assistant": "Assistant: ",
    "tool": "Tool: ",
    "system": "",
    "developer": "",
}


def prompt_ids(tokenizer: Any, prompt: Prompt, rendering: Rendering | None = None) -> list[int]:
    """The ids that a model reads before the completion, with at most one BOS in front.

    A text comes after the BOS, where the tokenizer puts one in front of texts. Messages go through the tokenizer's
    chat template, with the prompt for an answer at the end; without a template they are read as a plain transcript.

    Raises:
        DataError: the template refuses the messages, or a message contains the text of a special token and the
            template changes it in a way that cannot be followed.
    """
    if prompt.messages is None or not has_chat_template(tokenizer):
        bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        return [*bos, *_text_ids(tokenizer, prompt_text(prompt))]
    if specials_in(tokenizer, prompt):
        ids = _guarded_ids(tokenizer, prompt.messages, rendering)
    else:
        ids = _template_ids(tokenizer, prompt.messages, rendering)
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def teacher_prompt_ids(
    tokenizer: Any, prompt: Prompt, teacher: str, rendering: Rendering | None = None
) -> list[int]:
    """The ids that the teacher of this name reads before the completion.

    Raises:
        DataError: there are none, or its template refuses the messages; the message names the prompt's key.
    """
    try:
        ids = prompt_ids(tokenizer, prompt, rendering)
    except DataError as error:
        raise DataError(f"prompt {prompt.key}: for teacher {teacher}: {error}") from error
    if not ids:
        raise DataError(f"prompt {prompt.key}: it is empty for teacher {teacher}")
    return ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people and logs, and for models without a chat template: its text, or a plain transcript."""
    if prompt.messages is None:
        return prompt.text or ""
    turns = [_TRANSCRIPT_NAMES[message["role"]] + message["content"].strip() for message in prompt.messages]
    return "\n\n".join([*(turn for turn in turns if turn), "Assistant:"])


def begins_anew(prompt: Prompt) -> bool:
    """Whether a completion of the prompt is a text of its own, before which some tokenizers put a space (Llama-2).

    After messages it is: such models' templates leave that space to the tokenizer ("[/INST]", then "▁Yes"). What comes
    after a plain text continues it, and a space there is one that the model wrote.
    """
    return prompt.messages is not None


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return template_of(tokenizer) is not None


def specials_in(tokenizer: Any, prompt: Prompt) -> list[str]:
    """The special tokens of a tokenizer that a prompt holds as text, each once, in their order."""
    texts = [prompt.text or ""] if prompt.messages is None else [m["content"] for m in prompt.messages]
    pattern = _special(tokenizer).pattern
    return list(dict.fromkeys(found.group() for text in texts for found in pattern.finditer(text)))


def dropped_roles(
    tokenizer: Any, messages: Sequence[Message], rendering: Rendering | None = None
) -> list[int]:
    """The indices of the messages that a tokenizer's template does not show, whatever they say; empty without one.

    Each content is replaced by a mark that no template knows, so that a short one is not found by chance.

    Raises:
        DataError: the template refuses such messages.
    """
    if not has_chat_template(tokenizer):
        return []
    text = rendered(tokenizer, _marked(messages), rendering, add_generation_prompt=True)
    return [place for place in range(len(messages)) if _mark(place) not in text]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain texts, by itself or because its settings say so.

    That a tokenizer has a BOS token is not enough: some name one that their model never saw in front of a text.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    if getattr(tokenizer, "add_bos_token", None) is True:
        return True
    return list(tokenizer.encode("a", add_special_tokens=True))[:1] == [bos]


@dataclass
class _Special:
    """The special tokens of a tokenizer; `size` tells whether tokens were added since."""

    size: int
    id_of: dict[str, int]
    pattern: re.Pattern[str]
    unknown: int | None
    guard: "_Guard | None" = None

    def in_ids(self, ids: Sequence[int]) -> bool:
        """Whether special tokens other than the unknown one, which stands for text, are among the ids."""
        return not (set(self.id_of.values()) - {self.unknown}).isdisjoint(ids)


class _Guard:
    """A copy of a fast tokenizer that finds a stand-in for each special token in texts, but no special token."""

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
        """The ids of a text, with the special token's for each stand-in."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._special.in_ids(ids):
            raise _UnfollowedTemplateError("the tokenizer always reads it as one")
        return [self._id_of.get(index, index) for index in ids]


class _UnfollowedTemplateError(Exception):
    """A template or tokenizer that the stand-ins cannot follow; says which, as the end of a sentence."""


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
    # At the leftmost place the longest, as tokenizers find them.
    texts = sorted(id_of, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")
    special = _SPECIAL[tokenizer] = _Special(size, id_of, pattern, tokenizer.unk_token_id)
    return special


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, special-looking parts as text, nothing added."""
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    special = _special(tokenizer)
    if special.in_ids(ids):
        found = special.pattern.search(text)
        shown = f" {found.group()!r}" if found else ""
        raise DataError(
            f"the prompt contains a special token{shown} that the tokenizer cannot keep as text; remove it"
        )
    return ids


def _template_ids(tokenizer: Any, messages: Sequence[Message], rendering: Rendering | None) -> list[int]:
    text = rendered(tokenizer, messages, rendering, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _guarded_ids(tokenizer: Any, messages: Sequence[Message], rendering: Rendering | None) -> list[int]:
    """Ids of a rendered template in which special tokens count only where the template itself wrote them.

    The template is rendered a second time with a mark in place of each content: what lies between the marks is the
    template's. There its special tokens are replaced by stand-ins, which a copy of the tokenizer knows as ordinary
    added tokens while special ones are switched off. One pass of the tokenizer's own code then treats everything as
    it would have, and special-looking contents as text.
    """
    pattern = _special(tokenizer).pattern
    plain = [{**message, "content": pattern.sub("x", message["content"])} for message in messages]
    try:
        ids = _stand_in_ids(tokenizer, messages, rendering)
        # Compared with the ordinary way, on the same messages without the special-looking parts.
        if _stand_in_ids(tokenizer, plain, rendering) != _template_ids(tokenizer, plain, rendering):
            raise _UnfollowedTemplateError("the tokenizer treats its special tokens in an unusual way")
    except _UnfollowedTemplateError as error:
        place, found = next((i, f) for i, m in enumerate(messages) if (f := pattern.search(m["content"])))
        raise DataError(
            f"messages[{place}] contains {found.group()!r}, a special token of the model that cannot be kept as text "
            f"here, because {error}; remove it from the message"
        ) from error
    return ids


def _mark(place: int) -> str:
    """A mark for the content of a message: private-use characters have no case, and no template knows them."""
    return "\uf8e0" + "".join(chr(0xE000 + byte) for byte in place.to_bytes(4, "big")) + "\uf8e1"


def _marked(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": _mark(place)} for place, message in enumerate(messages)]


def _stand_in_ids(tokenizer: Any, messages: Sequence[Message], rendering: Rendering | None) -> list[int]:
    text = rendered(tokenizer, messages, rendering, add_generation_prompt=True)
    if re.search("[\ue000-\uf8ff\U00100000-\U0010fffd]", text):
        raise _UnfollowedTemplateError("private-use characters stand beside it")
    contents = {_mark(place): message["content"] for place, message in enumerate(messages)}
    marked = rendered(tokenizer, _marked(messages), rendering, add_generation_prompt=True)
    parts = re.split("(\uf8e0[^\uf8e1]*\uf8e1)", marked)
    # Many templates trim the white space around contents.
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
    return guard.ids(guarded)
