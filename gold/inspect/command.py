"""The implementation of `gold align`: the tokens of two tokenizers on one text."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TextIO

import numpy as np

from gold import terminal
from gold.align.vocabularies import VocabularyPair
from gold.errors import ConfigError, DataError, GoldError
from gold.files import json_value, open_file
from gold.inspect.view import AlignmentView, TokenizedSide, describe, summary
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

if TYPE_CHECKING:
    from gold.data import Prompt
    from gold.tokenize.templates import Rendering

MOST_BYTES = 8 * 2**20
"""A longer text is rejected: tokenizers need some 150 bytes of memory for every byte of a text."""


class Scorer(Protocol):
    """Both models, for the probabilities of their tokens."""

    vocabularies: tuple[Vocabulary, Vocabulary]
    tokenizers: tuple[Any, Any]

    def score(self, view: AlignmentView) -> AlignmentView:
        """The text with both models' log-probabilities."""
        ...


@dataclass(frozen=True)
class _Given:
    """A text, or the student's own ids; with a prompt it is a finished turn. `where` is the prefix of its errors."""

    text: str | bytes = b""
    ids: tuple[int, ...] | None = None
    prompt: "Prompt | None" = None
    where: str = ""


def run_align(
    text: str | None,
    *,
    student: str,
    teacher: str,
    file: Path | None = None,
    jsonl: Path | None = None,
    chat: Path | None = None,
    template_kwargs: tuple[str | None, str | None] = (None, None),
    ids: str | None = None,
    as_json: bool = False,
    html: Path | None = None,
    color: bool = True,
    load_scorer: Callable[[str, str], Scorer] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Writes the alignment of one text, or of each line of a JSON Lines file, to the stream.

    The text is one of `text`, the bytes of a `file`, the turns of the assistant in a `chat` (with `html` the last one),
    the decoded student `ids`, and the `text` of each line of `jsonl`, for which a line of JSON is written; without any
    of them, or for the name `-`, it is read from standard input. `template_kwargs` are the arguments of the chat
    templates of student and teacher, as JSON.
    `html` is the path of a page to write instead of the terminal output. Colours are used only on a terminal, if
    `color` is set and NO_COLOR is not. `load_scorer` loads the models of both sides, to score the text.

    Raises: DataError for a text that cannot be read, VocabularyError for a tokenizer.
    """
    out = stream or sys.stdout
    if jsonl is not None and html is not None:
        raise DataError(
            "--html is a page of one text; give TEXT, --file, --chat or --ids with it, not --jsonl"
        )
    given = _given(text, file, jsonl, chat, ids)
    renderings = [_rendering(*side) for side in zip(("student", "teacher"), template_kwargs, strict=True)]
    pair = _Pair((student, teacher), load_scorer, renderings)
    if jsonl is not None:
        for one in given:
            terminal.show_json(describe(pair.view(one)), out)
        return
    *earlier, last = given if html is None else list(given)[-1:]
    for one in earlier:  # the turns of a conversation
        _show(pair.view(one), as_json, color, out)
    view = pair.view(last)
    if html is not None:
        from gold.inspect.page import page

        try:
            html.write_text(page(view), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise DataError(f"{html}: cannot be written: {error.strerror}") from None
        if not as_json:
            terminal.show(*summary(view), f"written: {html}", stream=out)
            return
    _show(view, as_json, color, out)


def _show(view: AlignmentView, as_json: bool, color: bool, out: TextIO) -> None:
    """Writes the alignment of one text: a line of JSON, or a picture."""
    if as_json:
        terminal.show_json(describe(view), out)
        return
    from gold.inspect.terminal import show_alignment

    if isinstance(out, io.TextIOWrapper):  # an encoding without these characters must not fail
        out.reconfigure(errors="backslashreplace")
    show_alignment(view, terminal.new_console(out, color=color and not os.environ.get("NO_COLOR")))


class _Pair:
    """Both tokenizers, and everything that is the same for all texts."""

    def __init__(
        self,
        names: tuple[str, str],
        load_scorer: Callable[[str, str], Scorer] | None,
        renderings: "Sequence[Rendering]",
    ) -> None:
        self.names, self.renderings = names, renderings
        self.scorer = load_scorer(*names) if load_scorer else None
        self.vocabularies = VocabularyPair(
            *(self.scorer.vocabularies if self.scorer else (Vocabulary.load(n).with_markers() for n in names))
        )

    def view(self, given: _Given) -> AlignmentView:
        """The text tokenized by both sides."""
        try:
            view = self._tokenized(given)
            return self.scorer.score(view) if self.scorer else view
        except GoldError as error:
            raise type(error)(f"{given.where}{error}") from None

    def _tokenized(self, given: _Given) -> AlignmentView:
        student, teacher = sides = self.vocabularies.student, self.vocabularies.teacher
        more: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        if given.ids is None:
            texts = student.encode(given.text), teacher.encode(given.text)
        else:
            ids = list(given.ids)
            if ids and ids[0] == student.bos_id:
                more[0]["bos_id"], more[1]["bos_id"] = ids.pop(0), teacher.bos_id
            if ids and ids[-1] in student.stop_ids:
                more[0]["stop_ids"], more[1]["stop_ids"] = (ids.pop(),), teacher.stop_ids
            tokenized = student.decode(ids)
            texts = tokenized, self.vocabularies.to_teacher(tokenized)
        if given.prompt is not None:
            for i, vocabulary in enumerate(sides):
                more[i]["prompt_ids"] = self._prompt_ids(i, given.prompt)
                more[i]["stop_ids"] = vocabulary.stop_ids
        return AlignmentView(
            *(
                TokenizedSide(
                    self.names[i],
                    vocabulary,
                    texts[i],
                    _shared(vocabulary, texts[i], self._token_bytes[1 - i]),
                    **more[i],
                )
                for i, vocabulary in enumerate(sides)
            )
        )

    def _prompt_ids(self, side: int, prompt: "Prompt") -> tuple[int, ...]:
        from gold.tokenize.chat import prompt_ids

        try:
            return tuple(prompt_ids(self._tokenizers[side], prompt, self.renderings[side]))
        except DataError as error:
            raise DataError(f"{self.names[side]}: {error}") from None

    @cached_property
    def _token_bytes(self) -> list[set[bytes]]:
        """The token bytes of each vocabulary, as sets."""
        blobs = (
            (v.blob.tobytes(), v.offsets.tolist())
            for v in (self.vocabularies.student, self.vocabularies.teacher)
        )
        return [
            {data[first:last] for first, last in pairwise(offsets) if last > first} for data, offsets in blobs
        ]

    @cached_property
    def _tokenizers(self) -> tuple[Any, Any]:
        """Both tokenizers with their chat templates."""
        if self.scorer:
            return self.scorer.tokenizers
        from gold.tokenize.templates import PromptTokenizer

        return PromptTokenizer.of(self.vocabularies.student), PromptTokenizer.of(self.vocabularies.teacher)


def _shared(vocabulary: Vocabulary, tokenized: TokenizedText, others: set[bytes]) -> float:
    """The share of tokens whose bytes are one token of the other vocabulary."""
    ids, counts = np.unique(tokenized.ids[tokenized.ids < vocabulary.size], return_counts=True)
    known = [vocabulary.token_bytes(index) in others for index in ids.tolist()]
    return float(counts[known].sum()) / max(len(tokenized), 1)


def _rendering(side: str, arguments: str | None) -> "Rendering":
    """The arguments of a side's chat template, from JSON."""
    from gold.tokenize.templates import Rendering

    option = f"--{side}-template-kwargs"
    found = _json(arguments or "{}", f"{option}: ")
    try:
        return Rendering(found)
    except ConfigError as error:
        raise DataError(f"{option}: {str(error).removeprefix('template_kwargs').lstrip('.: ')}") from None


def _given(
    text: str | None, file: Path | None, jsonl: Path | None, chat: Path | None, ids: str | None
) -> Iterator[_Given]:
    """The texts; errors in the options themselves are raised before a tokenizer is loaded."""
    if sum(source is not None for source in (text, file, jsonl, chat, ids)) > 1:
        raise DataError("give at most one of TEXT, --file, --jsonl, --chat and --ids")
    if jsonl is not None:
        return _lines(_opened(jsonl), str(jsonl))
    if ids is not None:
        return iter([_Given(ids=_parsed_ids(ids))])
    if chat is not None:
        return _conversation(chat)
    if text is not None and text != "-":
        return iter([_Given(os.fsencode(text))])
    if text is None and file is None and sys.stdin.isatty():
        raise DataError("no text: give TEXT, --file, --jsonl, --chat or --ids, or pipe one in")
    return iter([_Given(_content(file or Path("-")))])


def _parsed_ids(given: str) -> tuple[int, ...]:
    parts = re.split(r"[\s,]+", given.strip().removeprefix("[").removesuffix("]"))
    for part in filter(None, parts):
        if not re.fullmatch("[0-9]{1,10}", part) or int(part) >= 2**31:
            raise DataError(
                f'--ids: {part[:40]!r} is no id; give whole numbers, such as "1 2 3" or "[1, 2, 3]"'
            )
    return tuple(int(part) for part in parts if part)


def _conversation(file: Path) -> Iterator[_Given]:
    """The turns of the assistant in a conversation, each after the messages before it."""
    from gold.data import MESSAGE_KEYS, Prompt
    from gold.turns import TURN_KEYS, TurnPrompt

    messages = _json(_content(file), f"{file}: ")
    last = messages[-1] if isinstance(messages, list) and messages else None
    completion = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
    if not isinstance(completion, str):
        raise DataError(
            f'{file}: needs a list of {{"role": …, "content": …}} that ends with a message of the assistant: '
            "its text is aligned, what is before it is the prompt"
        )
    turns = [n for n, m in enumerate(messages) if n and isinstance(m, dict) and m.get("role") == "assistant"]
    more = {key for m in messages if isinstance(m, dict) for key in m} - set(MESSAGE_KEYS)
    plain = not more or not more <= TURN_KEYS
    given = []
    for place in turns or [len(messages) - 1]:
        try:
            before = tuple(messages[:place])
            kind: type[Prompt] = Prompt if plain else TurnPrompt
            prompt = kind(str(file), messages=before, completion=messages[place].get("content"))
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        given.append(_Given(prompt.completion or "", prompt=prompt))
    return iter([one for one in given if one.text] or given[-1:])


def _lines(stream: BinaryIO, name: str) -> Iterator[_Given]:
    """The text of each line; empty lines are skipped."""
    with stream:
        for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES + 1), b""), start=1):
            where = f"{name}:{number}: "
            _check_size(line, where.removesuffix(": "))
            if not line.strip():
                continue
            record = _json(line, where)
            found = record.get("text") if isinstance(record, dict) else None
            if not isinstance(found, str):
                raise DataError(f'{where}needs an object with a string "text", got {line[:60]!r}')
            yield _Given(found, where=where)


def _json(data: bytes | str, where: str) -> Any:
    try:
        return json_value(data)
    except ValueError as error:
        raise DataError(f"{where}no JSON: {error}") from None


def _content(file: Path) -> bytes:
    with _opened(file) as stream:
        try:
            data = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    _check_size(data, str(file))
    return data


def _check_size(data: bytes, where: str) -> None:
    if len(data) > MOST_BYTES:
        raise DataError(
            f"{where}: more than {MOST_BYTES >> 20} MiB; a text is aligned as a whole, in memory: "
            "cut it into several lines of a --jsonl file"
        )


def _opened(file: Path) -> BinaryIO:
    return sys.stdin.buffer if str(file) == "-" else open_file(file, DataError)
