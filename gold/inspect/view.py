"""The data behind `gold align`: one text with both sides' tokens, special tokens, prompts and scores."""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from gold.align.chunks import Alignment, Coverage, align_tokens, coverage
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

Float64 = npt.NDArray[np.float64]

DRAWN_BYTES = 65_536
"""Pictures and pages show only the chunks that start within this many bytes; JSON has all of them."""

_WHITE_SPACE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}


@dataclass(frozen=True, eq=False)
class TokenizedSide:
    """One side's tokens of a text.

    `name` is the user's name for it. `shared` is the share of its tokens whose bytes are one token of the other
    vocabulary too. `bos_id` and `stop_ids` are the special tokens around the text, `prompt_ids` the tokens of the
    prompt. `logp_N` is the log-probability of each token given all before it, `stop_logp` that of the stop event,
    `entropy_N` the entropy of the distribution before each token; in nats, NaN if there is none.
    """

    name: str
    vocabulary: Vocabulary
    tokenized: TokenizedText
    shared: float
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    logp_N: Float64 | None = None
    stop_logp: float | None = None
    entropy_N: Float64 | None = None

    def __len__(self) -> int:
        return len(self.tokenized)


@dataclass(frozen=True)
class Score:
    """Both models' scores of one text, on the chunks in which every token has a log-probability on both sides.

    Bits per byte, and the nats per byte by which the student's log-probability exceeds the teacher's: for a text that
    the student sampled, an estimate of the reverse KL. The stop event counts if the text has one.
    """

    scored_bytes: int
    student_bits_per_byte: float
    teacher_bits_per_byte: float
    reverse_kl_sample_nats_per_byte: float


@dataclass(frozen=True)
class ExactScore:
    """KL(student ‖ teacher) of the next byte along one text, over all tokenizations that were followed, and its lower
    bound, both as nats per byte; and each side's mean share of mass of which the next byte is unresolved."""

    exact_reverse_kl_nats_per_byte: float
    least_reverse_kl_nats_per_byte: float
    unresolved_mass: float
    teacher_unresolved_mass: float


@dataclass(frozen=True, eq=False)
class AlignmentView:
    """One text as tokenized by both sides; ``exact`` if it was scored."""

    student: TokenizedSide
    teacher: TokenizedSide
    exact: ExactScore | None = field(default=None, kw_only=True)

    @cached_property
    def alignment(self) -> Alignment:
        """The chunks."""
        return align_tokens(self.student.tokenized, self.teacher.tokenized)

    @property
    def data(self) -> bytes:
        """The text."""
        return self.student.tokenized.data

    @property
    def sides(self) -> tuple[TokenizedSide, TokenizedSide]:
        """Student, teacher."""
        return self.student, self.teacher

    @property
    def coverage(self) -> Coverage:
        """Statistics of the alignment: how fine the chunks are."""
        return coverage(self.student.tokenized, self.teacher.tokenized, self.alignment)

    @cached_property
    def drawn(self) -> int:
        """The number of drawn chunks."""
        return int(np.searchsorted(self.alignment.starts_C, DRAWN_BYTES, "right"))

    @property
    def undrawn(self) -> str:
        """The end of the picture, in words; empty if it contains the whole text."""
        if self.drawn == len(self.alignment):
            return ""
        return f"the picture ends at byte {self.alignment.starts_C[self.drawn]} of {len(self.data)}"

    @property
    def bos_names(self) -> tuple[str, str] | None:
        """The names of both sides' BOS, if one of them has it; "–" for none."""
        return self._names([() if side.bos_id is None else (side.bos_id,) for side in self.sides])

    @property
    def stop_names(self) -> tuple[str, str] | None:
        """The names of both sides' stop ids, if one of them has any; "–" for none."""
        return self._names([side.stop_ids for side in self.sides])

    def _names(self, ids: Sequence[tuple[int, ...]]) -> tuple[str, str] | None:
        if not any(ids):
            return None
        student, teacher = (
            event_name(side.vocabulary, own) if own else "–"
            for side, own in zip(self.sides, ids, strict=True)
        )
        return student, teacher

    @cached_property
    def chunk_logp(self) -> tuple[Float64, Float64] | None:
        """Both sides' log-probability of each chunk, in nats; NaN if a token of it has none."""
        student, teacher = (side.logp_N for side in self.sides)
        if student is None or teacher is None:
            return None
        s0, s1, t0, t1 = self.alignment.chunks.T
        return _sums(student, s0, s1), _sums(teacher, t0, t1)

    @cached_property
    def score(self) -> Score | None:
        """The sums over chunks with all log-probabilities on both sides, and the stop event if both have scored it.

        None without log-probabilities.
        """
        if self.chunk_logp is None:
            return None
        whole = ~np.isnan(self.chunk_logp[0]) & ~np.isnan(self.chunk_logp[1])
        size = int((self.alignment.ends_C - self.alignment.starts_C)[whole].sum())
        stops = [side.stop_logp for side in self.sides]
        student, teacher = (
            float(sums[whole].sum()) + (stop if stop is not None and None not in stops else 0.0)
            for sums, stop in zip(self.chunk_logp, stops, strict=True)
        )
        per = max(size, 1)
        return Score(
            size, -student / per / math.log(2), -teacher / per / math.log(2), (student - teacher) / per
        )


def describe(view: AlignmentView) -> dict[str, Any]:
    """A text as JSON: ids and byte ends of both sides, and chunks as half-open ranges of their tokens.

    A side has the keys `bos_id` and `stop_ids` if the text has these tokens, `prompt_ids` if there is a prompt,
    `logp` and `entropy` (nats, null for a token without) and `stop_logp` if the text was scored; the text then has
    `score` and `exact` too.
    """
    found = {
        "bytes": len(view.data),
        "student": _describe_side(view.student),
        "teacher": _describe_side(view.teacher),
        "chunks": view.alignment.chunks.tolist(),
        "repaired_bytes": sum(side.tokenized.repaired_bytes for side in view.sides),
        "coverage": asdict(view.coverage)
        | {"shared_student_tokens": view.student.shared, "shared_teacher_tokens": view.teacher.shared},
    }
    if view.score is not None:
        found["score"] = asdict(view.score)
    if view.exact is not None:
        found["exact"] = asdict(view.exact)
    return found


def summary(view: AlignmentView) -> list[str]:
    """Lines on how fine the chunks are, and on the text's probability if it was scored."""
    (student, teacher), found = view.sides, view.coverage
    repaired = [side.tokenized.repaired_bytes for side in view.sides]
    lines = [
        f"{_count(len(view.data), 'byte')}: {_count(len(student), 'student token')}, "
        f"{_count(len(teacher), 'teacher token')}, {_count(found.chunks, 'chunk')}",
        f"one token on both sides: {_count(found.one_to_one_chunks, 'chunk')} = {found.student_tokens:.0%} of the "
        f"student's tokens, {found.teacher_tokens:.0%} of the teacher's, {found.bytes:.0%} of the bytes",
        f"largest chunk: {_count(found.largest_chunk_bytes, 'byte')}; most tokens in one: "
        f"{found.largest_chunk_tokens}, both sides together",
        f"shared vocabulary: {student.shared:.0%} of the student's tokens, {teacher.shared:.0%} of the teacher's are "
        "one token of the other side too",
        f"repaired: {_count(repaired[0], 'byte')} (student), {_count(repaired[1], 'byte')} (teacher)",
    ]
    if view.score is not None:
        score = view.score
        lines.append(
            f"bits per byte: {score.student_bits_per_byte:.3f} (student), {score.teacher_bits_per_byte:.3f} (teacher)"
        )
        lines.append(
            f"reverse KL, this sample alone: {score.reverse_kl_sample_nats_per_byte:+.4f} nats per byte"
        )
        if view.exact is not None:
            exact = view.exact
            lines.append(
                f"reverse KL, at every byte: {exact.exact_reverse_kl_nats_per_byte:.4f} nats per byte, at least "
                f"{exact.least_reverse_kl_nats_per_byte:.4f}; unresolved: {exact.unresolved_mass:.2%} (student), "
                f"{exact.teacher_unresolved_mass:.2%} (teacher)"
            )
        if student.stop_logp is not None and teacher.stop_logp is not None:
            lines.append(
                f"stop: {math.exp(student.stop_logp):.1%} (student), {math.exp(teacher.stop_logp):.1%} (teacher)"
            )
        if score.scored_bytes < len(view.data):
            lines.append(
                f"scored: {score.scored_bytes} of {_count(len(view.data), 'byte')}; left out are chunks with a token "
                "of probability 0, or with nothing before it (no BOS, no prompt)"
            )
    return lines


def visible(data: bytes) -> list[tuple[str, bool]]:
    """The visible form of some bytes, in runs; True marks placeholders.

    Placeholders are used for white space, for invisible characters, and for bytes that are not a character
    (hexadecimal). A leading combining mark gets a circle.
    """
    text = data.decode("utf-8", "surrogateescape")
    shown = [_stand_in(character) for character in text]
    if text and _combines(text[0]) and not shown[0][1]:
        shown.insert(0, ("◌", True))
    return [("".join(run for run, _ in runs), mark) for mark, runs in groupby(shown, key=lambda run: run[1])]


def event_name(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The name of special tokens: the tokenizer's own strings for the ids."""
    return "⟨" + "/".join(_shown_string(vocabulary, index) for index in ids) + "⟩"


def token_runs(side: TokenizedSide, index: int, first: int, last: int) -> Iterator[tuple[str, str]]:
    """The visible form of one token's bytes from `first` to `last`, in runs of kind "text", "mark" or "event".

    A token of no width is the name of its special token, else `∅`. A token whose own bytes differ from the text's is
    followed by `~`, a special token that covers text (the unknown token) by its name.
    """
    tokenized, vocabulary = side.tokenized, side.vocabulary
    token = int(tokenized.ids[index])
    end = int(tokenized.ends[index])
    start = int(tokenized.ends[index - 1]) if index else 0
    event = token >= vocabulary.size or bool(vocabulary.is_special[token])
    if start == end and not event:
        yield "∅", "event"
    for shown, mark in visible(tokenized.data[first:last]):
        yield shown, "mark" if mark else "text"
    if event and last == end:
        yield event_name(vocabulary, (token,)), "event"
    elif last == end and not tokenized.exact[index]:
        yield "~", "event"


def prompt_runs(side: TokenizedSide) -> Iterator[tuple[str, str]]:
    """The prompt of one side, see `id_runs`."""
    return id_runs(side.vocabulary, side.prompt_ids or ())


def id_runs(vocabulary: Vocabulary, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
    """What a model reads, in runs of kind "text", "mark" (see `visible`) and "event" (a special token).

    Spaces are plain spaces here, and a line ends after each placeholder of a line break.
    """
    for event, run in groupby(
        ids, key=lambda index: index >= vocabulary.size or vocabulary.is_special[index]
    ):
        part = list(run)
        if event:
            for index in part:
                yield event_name(vocabulary, (index,)), "event"
            continue
        for words in re.split(b"( +)", vocabulary.decode(part, at_start=False).data):
            if words.startswith(b" "):
                yield words.decode(), "text"
                continue
            for shown, mark in visible(words):
                yield shown.replace("⏎", "⏎\n") if mark else shown, "mark" if mark else "text"


def _describe_side(side: TokenizedSide) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ids": side.tokenized.ids.tolist(),
        "ends": side.tokenized.ends.tolist(),
        "repaired_bytes": side.tokenized.repaired_bytes,
    }
    if side.bos_id is not None:
        found["bos_id"] = side.bos_id
    if side.stop_ids:
        found["stop_ids"] = list(side.stop_ids)
    if side.prompt_ids is not None:
        found["prompt_ids"] = list(side.prompt_ids)
    for name, value_N in (("logp", side.logp_N), ("entropy", side.entropy_N)):
        if value_N is not None:
            found[name] = [None if math.isnan(x) else round(x, 6) for x in value_N.tolist()]
    if side.stop_logp is not None:
        found["stop_logp"] = round(side.stop_logp, 6)
    return found


def _sums(logp_N: Float64, firsts: npt.NDArray[np.int32], lasts: npt.NDArray[np.int32]) -> Float64:
    """The sum of each range of tokens; NaN for an empty range: it says nothing about the bytes."""
    sums = [logp_N[a:b].sum() if b > a else np.nan for a, b in zip(firsts, lasts, strict=True)]
    return np.array(sums, np.float64)


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _stand_in(character: str) -> tuple[str, bool]:
    if character in _WHITE_SPACE:
        return _WHITE_SPACE[character], True
    if "\udc80" <= character <= "\udcff":  # an invalid byte
        return f"\\x{ord(character) - 0xDC00:02x}", True
    if character.isprintable():
        return character, False
    return character.encode("unicode_escape").decode("ascii"), True


def _combines(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


def _shown_string(vocabulary: Vocabulary, index: int) -> str:
    return "".join(run for run, _ in visible(vocabulary.label(index).encode("utf-8", "surrogatepass")))
