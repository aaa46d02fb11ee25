"""The body of `gold align`: two tokenizers, a text, and where their tokens end."""

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
from gold.errors import ConfigError, DataError, GoldError
from gold.files import json_value, open_file
from gold.inspect.view import AlignmentView, TokenizedSide, describe, summary
from gold.tokenize.markers import retokenize, shared_markers
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

if TYPE_CHECKING:
    from gold.data import Prompt
    from gold.tokenize.templates import Rendering

MOST_BYTES = 8 * 2**20
"""A longer text is refused: tokenizers hold some 150 bytes of memory for every byte of a text."""


class Scorer(Protocol):
    """Both models, for the probabilities of their tokens."""

    vocabularies: tuple[Vocabulary, Vocabulary]
    tokenizers: tuple[Any, Any]

    def score(self, view: AlignmentView) -> AlignmentView:
        """The text with both models' log-probabilities."""
        ...


@dataclass(frozen=True)
class _Given:
    """One text to be aligned, or the student's own ids; with a prompt it is a turn that has ended.

    `where` is what an error begins with.
    """

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

    The text is one of `text`, the bytes of a `file`, the last message of a `chat`, what the student's own `ids` spell,
    and the `text` of each line of `jsonl`, answered by a line of JSON; without any of them, or where the name is `-`,
    it is read from standard input. `template_kwargs` are what the chat templates of student and teacher are given, as
    JSON. `html` is a page to write in place of the picture. There are colours only on a
    terminal, and only if `color` and without NO_COLOR. `load_scorer` loads the models of both sides, to score the text.

    Raises: DataError for a text that cannot be read, VocabularyError for a tokenizer.
    """
    out = stream or sys.stdout
    if jsonl is not None and html is not None:
        raise DataError(
            "--html is a page of one text; give TEXT, --file, --chat or --ids with it, not --jsonl"
        )
    given = _given(text, file, jsonl, chat, ids)
    sides = zip(("student", "teacher"), template_kwargs, strict=True)
    renderings = [_rendering(side, arguments) for side, arguments in sides]
    pair = _Pair((student, teacher), load_scorer, renderings)
    if jsonl is not None:
        for one in given:
            terminal.show_json(describe(pair.view(one)), out)
        return
    view = pair.view(next(given))
    if html is not None:
        from gold.inspect.page import page

        try:
            html.write_text(page(view), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise DataError(f"{html}: cannot be written: {error.strerror}") from None
    if as_json:
        terminal.show_json(describe(view), out)
    elif html is not None:
        terminal.show(*summary(view), f"written: {html}", stream=out)
    else:
        _draw(view, out, color)


def _draw(view: AlignmentView, out: TextIO, color: bool) -> None:
    from gold.inspect.terminal import show_alignment

    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(
            errors="backslashreplace"
        )  # an encoding without these characters is no reason to fail
    plain = not color or bool(os.environ.get("NO_COLOR"))
    show_alignment(view, terminal.new_console(out, color=not plain))


class _Pair:
    """Both tokenizers, and what does not change from text to text."""

    def __init__(
        self,
        names: tuple[str, str],
        load_scorer: Callable[[str, str], Scorer] | None,
        renderings: "Sequence[Rendering]",
    ) -> None:
        self.names, self.renderings = names, renderings
        self.scorer = load_scorer(*names) if load_scorer else None
        self.vocabularies = (
            self.scorer.vocabularies
            if self.scorer
            else (Vocabulary.load(names[0]).with_markers(), Vocabulary.load(names[1]).with_markers())
        )

    def view(self, given: _Given) -> AlignmentView:
        """One text as both sides read it."""
        try:
            view = self._read(given)
            return self.scorer.score(view) if self.scorer else view
        except GoldError as error:
            raise type(error)(f"{given.where}{error}") from None

    def _read(self, given: _Given) -> AlignmentView:
        student, teacher = self.vocabularies
        beside: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        if given.ids is None:
            tokenized_texts = student.encode(given.text), teacher.encode(given.text)
        else:
            ids = list(given.ids)
            if ids and ids[0] == student.bos_id:
                beside[0]["bos_id"], beside[1]["bos_id"] = ids.pop(0), teacher.bos_id
            if ids and ids[-1] in student.stop_ids:
                beside[0]["stop_ids"], beside[1]["stop_ids"] = (ids.pop(),), teacher.stop_ids
            tokenized = student.decode(ids)
            tokenized_texts = (
                tokenized,
                tokenized if self._same else retokenize(teacher, tokenized, self._markers),
            )
        if given.prompt is not None:
            told = zip(beside, self.names, self.vocabularies, self._tokenizers, self.renderings, strict=True)
            for side, name, vocabulary, tokenizer, rendering in told:
                side["prompt_ids"] = _prompt_ids(name, tokenizer, given.prompt, rendering)
                side["stop_ids"] = vocabulary.stop_ids
        sides = [
            TokenizedSide(name, vocabulary, tokenized, _shared(vocabulary, tokenized, others), **more)
            for name, vocabulary, tokenized, others, more in zip(
                self.names,
                self.vocabularies,
                tokenized_texts,
                reversed(self._token_bytes),
                beside,
                strict=True,
            )
        ]
        return AlignmentView(*sides)

    @cached_property
    def _same(self) -> bool:
        """Whether the teacher reads the student's own ids, as in training."""
        student, teacher = self.vocabularies
        return student.same_as(teacher)

    @cached_property
    def _markers(self) -> dict[int, int]:
        return shared_markers(*self.vocabularies)

    @cached_property
    def _token_bytes(self) -> tuple[set[bytes], set[bytes]]:
        """The bytes of all tokens of both vocabularies."""
        student, teacher = (
            {data[first:last] for first, last in pairwise(offsets) if last > first}
            for data, offsets in ((v.blob.tobytes(), v.offsets.tolist()) for v in self.vocabularies)
        )
        return student, teacher

    @cached_property
    def _tokenizers(self) -> tuple[Any, Any]:
        """Both tokenizers with their chat templates."""
        if self.scorer:
            return self.scorer.tokenizers
        from gold.tokenize.templates import PromptTokenizer

        student, teacher = (PromptTokenizer.of(vocabulary) for vocabulary in self.vocabularies)
        return student, teacher


def _shared(vocabulary: Vocabulary, tokenized: TokenizedText, others: set[bytes]) -> float:
    """The share of tokens whose bytes are one of the other vocabulary's."""
    ids, counts = np.unique(tokenized.ids[tokenized.ids < vocabulary.size], return_counts=True)
    known = [vocabulary.token_bytes(index) in others for index in ids.tolist()]
    return float(counts[known].sum()) / max(len(tokenized), 1)


def _rendering(side: str, arguments: str | None) -> "Rendering":
    """What a side's chat template is given beside the messages, from JSON."""
    from gold.tokenize.templates import Rendering

    option = f"--{side}-template-kwargs"
    try:
        found = json_value(arguments or "{}")
    except ValueError as error:
        raise DataError(f"{option}: no JSON: {error}") from None
    try:
        return Rendering(found)
    except ConfigError as error:
        raise DataError(f"{option}: {str(error).removeprefix('template_kwargs').lstrip('.: ')}") from None


def _prompt_ids(name: str, tokenizer: Any, prompt: "Prompt", rendering: "Rendering") -> tuple[int, ...]:
    from gold.tokenize.chat import prompt_ids

    try:
        return tuple(prompt_ids(tokenizer, prompt, rendering))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _given(
    text: str | None, file: Path | None, jsonl: Path | None, chat: Path | None, ids: str | None
) -> Iterator[_Given]:
    """The texts; what can be said of them before a tokenizer is loaded is said at once."""
    if sum(source is not None for source in (text, file, jsonl, chat, ids)) > 1:
        raise DataError("give at most one of TEXT, --file, --jsonl, --chat and --ids")
    if ids is not None:
        return iter([_Given(ids=_parsed_ids(ids))])
    if chat is not None:
        return iter([_conversation(chat)])
    if jsonl is not None:
        return _lines(_opened(jsonl), str(jsonl))
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


def _conversation(file: Path) -> _Given:
    from gold.data import Prompt

    try:
        messages = json_value(_content(file))
    except ValueError as error:
        raise DataError(f"{file}: no JSON: {error}") from None
    last = messages[-1] if isinstance(messages, list) and messages else None
    if (
        not isinstance(last, dict)
        or last.get("role") != "assistant"
        or not isinstance(last.get("content"), str)
    ):
        raise DataError(
            f'{file}: needs a list of {{"role": …, "content": …}} that ends with a message of the assistant: '
            "its text is aligned, what is before it is the prompt"
        )
    try:
        prompt = Prompt(str(file), messages=tuple(messages[:-1]), completion=last["content"])
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return _Given(last["content"], prompt=prompt)


def _lines(stream: BinaryIO, name: str) -> Iterator[_Given]:
    """The text of each line; lines of white space are passed over."""
    with stream:
        for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES + 1), b""), start=1):
            where = f"{name}:{number}: "
            if len(line) > MOST_BYTES:
                raise DataError(
                    f"{where}more than {MOST_BYTES >> 20} MiB in one line; cut its text into several"
                )
            if not line.strip():
                continue
            try:
                record = json_value(line)
            except ValueError as error:
                raise DataError(f"{where}no JSON: {error}") from None
            found = record.get("text") if isinstance(record, dict) else None
            if not isinstance(found, str):
                raise DataError(f'{where}needs an object with a string "text", got {line[:60]!r}')
            yield _Given(found, where=where)


def _content(file: Path) -> bytes:
    with _opened(file) as stream:
        try:
            data = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise DataError(
            f"{file}: more than {MOST_BYTES >> 20} MiB; a text is aligned in one piece, in memory: "
            "cut it into the lines of a --jsonl file"
        )
    return data


def _opened(file: Path) -> BinaryIO:
    if str(file) == "-":
        return sys.stdin.buffer
    return open_file(file, DataError)
