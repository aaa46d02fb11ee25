"""The checks that need no weights: what two tokenizers and the files beside them tell of a pair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gold.align.chunks import Alignment, align_tokens
from gold.align.overlap import byte_equal_pairs, longest_prefixes
from gold.doctor.sample import JUDGED, SAMPLE
from gold.doctor.side import Side
from gold.doctor.sizes import StepMemory
from gold.tokenize.compare import differences
from gold.tokenize.families import BYTE_FALLBACK, BYTE_LEVEL
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

Status = Literal["pass", "warn", "fail"]

# Where a number decides, it is one of these.
MOST_REPAIRED = 0.5
"""Fail above: share of a text's bytes in tokens that a side does not spell as they are: it reads mostly another text.
What lower-casing and stripped accents change in prose stays well below."""
MOST_CHANGED = 0.01
"""Warn above: the same share, in any class. Below it lie the odd decomposed accents that a normaliser composes."""
LEAST_ONE_TO_ONE = 0.25
"""Warn below: share of the student's tokens, in any class, that are one chunk with one teacher token. `support: shared`
would say nothing of three quarters of the states; real pairs have 0.4 to 0.9 on prose."""
LONGEST_SPAN_BYTES = 256
"""Warn above: mean bytes between hard edges. A span has one advantage for all its tokens, here more than fifty."""
NEARLY_SAME = 0.98
"""Warn above: share of ids that spell the same bytes in two vocabularies that are not the same. Two families never come
near it, two versions of one family always do."""
MOST_WITHOUT_PREFIX = 0.001
"""Warn above: share of the teacher's tokens none of whose beginnings the student can write."""
MARKERS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|channel|>",
    "<|call|>",
    "<｜tool▁calls▁begin｜>",
)
"""Thinking and tool markers of the families that have some."""

_BY_TOKENS = ("shared", "one_to_one", "gold")
"""Options and objectives that compare tokens of equal bytes."""
RUN_TEXTS = "run"
"""The class of a run's own texts."""
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
_NUMBER = re.compile(rb"\d{2,}")


@dataclass(frozen=True)
class Check:
    """What one check found and what to do about it, nothing where it passed.

    `concerns` names what minds a warning, where not every run does: objectives, options of theirs such as the support
    "shared", or "messages" among the prompts.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    concerns: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassCoverage:
    """How both sides cut the texts of a class: shares of tokens and bytes in chunks of one token on both sides, bytes
    that a side does not spell as they are, chunks, and student tokens."""

    bytes: int
    student_tokens: int
    teacher_tokens: int
    one_to_one_tokens: float
    one_to_one_bytes: float
    largest_chunk_bytes: int
    chunks: int
    texts: int
    student_repaired_bytes: int
    teacher_repaired_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything that was found of a pair; `unchecked` says what could not be looked at, and what it would take;
    `memory` is what the check of that name was made of, `sides` are both as their files tell them, where those can be
    read."""

    checks: list[Check]
    coverage: Mapping[str, ClassCoverage] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    memory: StepMemory | None = None
    sides: tuple[Side, ...] = ()

    @property
    def failures(self) -> list[Check]:
        """The checks that say that the pair cannot be trained."""
        return [check for check in self.checks if check.status == "fail"]

    @property
    def verdict(self) -> Status:
        """The worst status of all checks."""
        warned = any(check.status == "warn" for check in self.checks)
        return "fail" if self.failures else "warn" if warned else "pass"


@dataclass(frozen=True)
class _Text:
    """One text, read by both sides."""

    student: TokenizedText
    teacher: TokenizedText
    alignment: Alignment


def examine(student: Side, teacher: Side, texts: Sequence[str] = ()) -> Report:
    """What the tokenizers of a pair, and the files beside them, tell before a model is loaded.

    `texts` are the run's own, where there is a run: then they decide whether the pair can be trained, and the built-in
    sample only tells where it is weak.
    """
    texts = [text for text in texts if text]
    sample = {**({RUN_TEXTS: texts} if texts else {}), **SAMPLE}
    read = {name: [_read(student, teacher, text) for text in group] for name, group in sample.items()}
    coverage = {name: _coverage(group) for name, group in read.items()}
    judged = RUN_TEXTS if texts else JUDGED
    aligned = [text for group in read.values() for text in group]
    pairs = byte_equal_pairs(student.marked, teacher.marked)
    checks = [
        _spelling(student, teacher),
        _vocabularies(student, teacher, pairs),
        _stops(student, teacher),
        _bos(student, teacher),
        _templates(student, teacher),
        _markers(student, teacher),
        _bytes(student, teacher, coverage, judged),
        _edges(coverage, judged),
        _one_to_one(coverage),
        _digits(aligned),
        _hard_edges(teacher, aligned if judged == JUDGED else read[judged]),
        _prefixes(student, teacher),
    ]
    unchecked = []
    if student.config or teacher.config:
        checks.insert(2, _rows(student, teacher))
    else:
        unchecked.append("output rows: there is no config.json beside the tokenizers")
    return Report(checks, coverage, unchecked)


def _read(student: Side, teacher: Side, text: str) -> _Text:
    tokenized_texts = student.vocabulary.encode(text), teacher.vocabulary.encode(text)
    return _Text(*tokenized_texts, align_tokens(*tokenized_texts))


def _coverage(texts: Sequence[_Text]) -> ClassCoverage:
    size = sum(len(t.student.data) for t in texts)
    tokens = sum(len(t.student) for t in texts)
    ones = [t.alignment.one_to_one_C for t in texts]
    widths = [t.alignment.ends_C - t.alignment.starts_C for t in texts]
    return ClassCoverage(
        bytes=size,
        student_tokens=tokens,
        teacher_tokens=sum(len(t.teacher) for t in texts),
        one_to_one_tokens=sum(int(one.sum()) for one in ones) / max(tokens, 1),
        one_to_one_bytes=sum(int(w[one].sum()) for w, one in zip(widths, ones, strict=True)) / max(size, 1),
        largest_chunk_bytes=max((int(w.max(initial=0)) for w in widths), default=0),
        chunks=sum(len(t.alignment) for t in texts),
        texts=len(texts),
        student_repaired_bytes=sum(t.student.repaired_bytes for t in texts),
        teacher_repaired_bytes=sum(t.teacher.repaired_bytes for t in texts),
    )


# The checks, in the order in which they are shown


def _spelling(student: Side, teacher: Side) -> Check:
    sides = (f"{s.role} {s.vocabulary.family}, {s.vocabulary.size:,} ids" for s in (student, teacher))
    return Check("spelling", "pass", "; ".join(sides))


def same_vocabulary(student: Vocabulary, teacher: Vocabulary) -> bool:
    """Whether every id spells the same bytes on both sides and the same ids stop."""
    return student.fingerprint == teacher.fingerprint and set(student.stop_ids) == set(teacher.stop_ids)


def _vocabularies(student: Side, teacher: Side, pairs: tuple[np.ndarray, np.ndarray]) -> Check:
    mine, theirs = student.marked, teacher.marked
    name = "vocabulary"
    if same_vocabulary(mine, theirs):
        return Check(
            name, "pass", "the same on both sides, id by id: the teacher reads the student's own tokens"
        )
    ids_V, ids_W = pairs
    alike = int((ids_V == ids_W).sum()) / max(mine.size, theirs.size, 1)
    if alike > NEARLY_SAME:
        return Check(
            name,
            "warn",
            f"almost the same (here is the student): {'; '.join(differences(mine, theirs, limit=2))}",
            "the pair is trained as two vocabularies; if one file and the same stop ids fit both models, use them",
        )
    size = "the same size but other content" if mine.size == theirs.size else "two"
    texts_V, texts_W = int((~mine.is_special).sum()), int((~theirs.is_special).sum())
    return Check(
        name,
        "pass",
        f"{size}: {len(ids_V):,} tokens with the same bytes, {len(ids_V) / max(texts_V, 1):.0%} of the student's, "
        f"{len(ids_V) / max(texts_W, 1):.0%} of the teacher's",
    )


def _rows(student: Side, teacher: Side) -> Check:
    found, bad = [], []
    for side in (student, teacher):
        rows = side.config.get("vocab_size")
        if not isinstance(rows, int):
            continue
        size = side.vocabulary.size
        more = (
            "" if rows == size else f" ({abs(rows - size):,} {'padding' if rows > size else 'without a row'})"
        )
        found.append(f"{side.role} {rows:,} for {size:,} ids{more}")
        lost = int((~side.vocabulary.is_special[rows:]).sum())
        if lost:
            bad.append(
                f"{side.role}: its tokenizer has {size:,} ids, its output matrix {rows:,} rows, none of {lost:,} tokens"
            )
    if bad:
        return Check(
            "output rows",
            "fail",
            "; ".join(bad),
            "give the tokenizer that came with these weights; where tokens were added to it, resize the embeddings "
            "(resize_token_embeddings) and train them first",
        )
    return Check("output rows", "pass", "; ".join(found))


def _stops(student: Side, teacher: Side) -> Check:
    sides = (student, teacher)
    found = "; ".join(f"{side.role} {_stop_tokens(side)}" for side in sides)
    silent = [side for side in sides if not side.vocabulary.stop_ids]
    if lacking := [side.role for side in silent if not side.bare]:
        return Check(
            "stop",
            "fail",
            f"no stop id: {', '.join(lacking)}",
            "name one in roles.stop, or set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json",
        )
    if silent:
        return Check(
            "stop",
            "warn",
            f"a tokenizer file alone names no stop id: {', '.join(side.role for side in silent)}",
            "give the model's folder instead",
        )
    for side in sides:
        ending = _ending(side)
        if ending is not None and ending not in side.vocabulary.stop_ids:
            return Check(
                "stop",
                "warn",
                f"{found}; but the template of the {side.role} ends an answer with {side.tokens((ending,))}",
                "let it be a stop too (roles.stop, or eos_token_id in generation_config.json), or answers run on",
                ("messages",),
            )
    return Check("stop", "pass", found)


def _ending(side: Side) -> int | None:
    """The special token with which a side's template ends an answer, where it writes one."""
    closing = "" if side.turn is None else side.turn.closing.lstrip()
    found = [
        (len(token.content), index)
        for index, token in side.added.items()
        if token.special and closing.startswith(token.content)
    ]
    return max(found)[1] if found else None


def _bos(student: Side, teacher: Side) -> Check:
    found, idle = [], []
    for side in (student, teacher):
        index = side.vocabulary.bos_id
        token = "none" if index is None else side.tokens((index,))
        if index is None:
            found.append(f"{side.role} none")
        elif side.puts_bos:
            found.append(f"{side.role} {token}, before every text")
        elif side.turn is not None and token in side.turn.before:
            found.append(f"{side.role} {token}, written by its template")
        elif index in side.vocabulary.stop_ids:
            found.append(f"{side.role} none ({token} is its stop)")
        else:
            found.append(f"{side.role} {token}, which nothing puts before a text")
            idle.append(side)
    if idle:
        return Check(
            "BOS",
            "warn",
            "; ".join(found),
            f"if the {' or the '.join(side.role for side in idle)} was trained with it, name it in roles.bos, or set "
            "add_bos_token: true in tokenizer_config.json: without its BOS a model may write rubbish",
        )
    return Check("BOS", "pass", "; ".join(found))


def _templates(student: Side, teacher: Side) -> Check:
    name = "chat template"
    have = [side for side in (student, teacher) if side.template]
    if len(have) == 1:
        other = teacher if have[0] is student else student
        return Check(
            name,
            "warn",
            f"only the {have[0].role} has one; the {other.role} reads messages as a plain transcript",
            f"for conversations take a {other.role} that was trained on them, or give prompts as plain text",
            ("messages",),
        )
    if not have:
        return Check(name, "pass", "none on either side: both read messages as a plain transcript")
    thinking = [side.role for side in have if side.turn and side.turn.opening.rstrip().endswith("<think>")]
    if len(thinking) == 1:
        return Check(
            name,
            "warn",
            f"the template of the {thinking[0]} opens <think> before the answer, the other one does not",
            "one model is asked to think aloud and the other to answer: have both do the same, by template_kwargs "
            "where a template asks for it ({enable_thinking: false} of Qwen3), or by another template",
            ("messages",),
        )
    if student.template == teacher.template:
        return Check(name, "pass", "the same on both sides")
    opaque = [side.role for side in have if side.turn is None]
    return Check(
        name,
        "pass",
        "one of its own on either side; each model reads its own"
        + (
            f" ({', '.join(opaque)}: it takes no plain question, so it was not looked into)" if opaque else ""
        ),
    )


def _markers(student: Side, teacher: Side) -> Check:
    name = "markers"
    kinds = {marker: (student.kind(marker), teacher.kind(marker)) for marker in MARKERS}
    known = {marker: kind for marker, kind in kinds.items() if kind != ("text", "text")}
    if not known:
        return Check(name, "pass", "no thinking or tool marker is a token of either side: all are text")
    alone = [(marker, *kind) for marker, kind in known.items() if kind.count("special") == 1]
    if alone:
        shown = ", ".join(f"{marker} ({s} of the student, {t} of the teacher)" for marker, s, t in alone)
        return Check(
            name,
            "warn",
            shown.replace("text of", "plain characters to"),
            "what is special to one side alone the other reads and writes as characters, which the first has hardly "
            "seen: take prompts and templates that do without",
        )
    return Check(name, "pass", f"{', '.join(known)}: each side reads what the other writes")


def _bytes(student: Side, teacher: Side, coverage: Mapping[str, ClassCoverage], judged: str) -> Check:
    name = "bytes"
    shares = {
        role: {kind: getattr(c, f"{role}_repaired_bytes") / max(c.bytes, 1) for kind, c in coverage.items()}
        for role in ("student", "teacher")
    }
    if lost := [(role, share[judged]) for role, share in shares.items() if share[judged] > MOST_REPAIRED]:
        return Check(
            name,
            "fail",
            f"of {_named(judged)} "
            + " and ".join(f"{share:.0%} is not spelled by the {role} as it is" for role, share in lost),
            f"take a {' and a '.join(role for role, _ in lost)} whose tokenizer was made for such texts"
            + ("" if judged == RUN_TEXTS else "; gold doctor CONFIG judges a pair by a run's own prompts"),
        )
    lacking = [line for side in (student, teacher) if (line := _lacking(side))]
    changed = [
        f"the {role} changes or drops {', '.join(touched)}"
        for role, share in shares.items()
        if (touched := [f"{one:.0%} of {_named(kind)}" for kind, one in share.items() if one > MOST_CHANGED])
    ]
    if not lacking and not changed:
        return Check(name, "pass", "both sides have every byte and spell every text as it is")
    found = "; ".join([*lacking, *changed])
    if judged == RUN_TEXTS and max(share[judged] for share in shares.values()) <= MOST_CHANGED:
        return Check(name, "pass", f"this run's texts are spelled as they are; elsewhere {found}")
    return Check(
        name,
        "warn",
        found,
        "such bytes vanish from what that side reads, belong to no shared edge, and are counted (repaired_share)",
    )


def _lacking(side: Side) -> str:
    """What bytes a vocabulary has no token for, nothing where it has all that UTF-8 uses."""
    vocabulary = side.vocabulary
    single = np.flatnonzero(np.diff(vocabulary.offsets) == 1)
    own = set(vocabulary.blob[vocabulary.offsets[single]].tolist())
    if max(own, default=0) < 0x80 and vocabulary.family not in (BYTE_LEVEL, BYTE_FALLBACK):
        return f"the {side.role} has no bytes to fall back on: characters outside its vocabulary are unknown to it"
    gone = [byte for byte in _UTF8_BYTES if byte not in own]
    shown = " ".join(f"{byte:02x}" for byte in gone[:8]) + (" …" if len(gone) > 8 else "")
    return (
        f"the {side.role} lacks {len(gone)} of the {len(_UTF8_BYTES)} bytes of UTF-8 ({shown})"
        if gone
        else ""
    )


def _edges(coverage: Mapping[str, ClassCoverage], judged: str) -> Check:
    name = "shared edges"
    found = coverage[judged]
    apart = found.chunks - found.texts
    if not apart and min(found.student_tokens, found.teacher_tokens) > found.texts:
        return Check(
            name,
            "fail",
            f"none inside {_named(judged)}: no token of the student ends where one of the teacher ends",
            "one of the tokenizers does not read these texts; look at one with gold align",
        )
    largest = max(coverage.items(), key=lambda item: item[1].largest_chunk_bytes)
    return Check(
        name,
        "pass",
        f"one every {found.bytes / max(found.chunks, 1):.1f} bytes of {_named(judged)}; the largest chunk of all has "
        f"{largest[1].largest_chunk_bytes} bytes ({largest[0]})",
    )


def _one_to_one(coverage: Mapping[str, ClassCoverage]) -> Check:
    found = ", ".join(f"{kind} {c.one_to_one_tokens:.0%}" for kind, c in coverage.items())
    few = [kind for kind, c in coverage.items() if c.one_to_one_tokens < LEAST_ONE_TO_ONE]
    text = f"of the student's tokens: {found}"
    if few:
        return Check(
            "one to one",
            "warn",
            text,
            f"support shared compares little of {', '.join(few)}; support bytes compares every byte",
            _BY_TOKENS,
        )
    return Check("one to one", "pass", text)


def _digits(texts: Sequence[_Text]) -> Check:
    """Whether both sides cut numbers alike: the edges inside every run of digits that both spell."""
    numbers = apart = 0
    longest = [1, 1]
    for text in texts:
        sides = (text.student, text.teacher)
        spelled = np.logical_and(*(np.repeat(side.exact, side.ends - side.starts) for side in sides))
        for number in _NUMBER.finditer(text.student.data):
            first, last = number.span()
            if not spelled[first:last].all():
                continue
            inner = [side.ends[(side.ends > first) & (side.ends < last)].tolist() for side in sides]
            numbers += 1
            apart += inner[0] != inner[1]
            widths = [np.diff([first, *cuts, last]).max() for cuts in inner]
            longest = [max(pair) for pair in zip(longest, widths, strict=True)]
    if not numbers:
        return Check("digits", "pass", "no number that both sides can spell")
    shown = ", ".join(
        f"{role} digit by digit" if most == 1 else f"{role} up to {most} digits a token"
        for role, most in zip(("student", "teacher"), longest, strict=True)
    )
    if apart:
        return Check(
            "digits",
            "warn",
            f"{apart} of {numbers} numbers are cut differently: {shown}",
            "with support shared numbers are hardly taught at all; support bytes teaches every digit",
            _BY_TOKENS,
        )
    return Check("digits", "pass", f"{numbers} numbers, all cut alike: {shown}")


def _hard_edges(teacher: Side, texts: Sequence[_Text]) -> Check:
    spans = size = 0
    for text in texts:
        hard = text.teacher.ends[teacher.vocabulary.stable_ends(text.teacher)]
        spans += len(np.intersect1d(hard, text.alignment.ends_C))
        size += len(text.student.data)
    found = f"{spans} in {size:,} bytes" if spans else f"none in {size:,} bytes"
    if size > LONGEST_SPAN_BYTES * spans:
        return Check(
            "hard edges",
            "warn",
            f"{found}: hardly anywhere does the teacher cut whatever comes next",
            "span_pg would give a whole text one advantage, which is mostly noise; take a divergence on bytes",
            ("span_pg", "span"),
        )
    return Check("hard edges", "pass", f"{found}: span_pg has a span every {size / spans:.0f} bytes")


def _prefixes(student: Side, teacher: Side) -> Check:
    found = longest_prefixes(student.marked, teacher.marked)
    text_W = ~teacher.marked.is_special
    texts = max(int(text_W.sum()), 1)
    none = int((found.ids_W[text_W] < 0).sum())
    whole = int((found.rest_bytes_W[text_W] == 0).sum())
    byte = int(((found.prefix_bytes_W == 1) & (found.rest_bytes_W > 0))[text_W].sum())
    text = (
        f"{whole / texts:.0%} of the teacher's tokens are tokens of the student, {(texts - whole - none) / texts:.0%} "
        f"begin with a shorter one ({byte:,} with a single byte), {none:,} with none"
    )
    if none > MOST_WITHOUT_PREFIX * texts:
        return Check(
            "prefix map",
            "warn",
            text,
            "support prefix cannot hand on what the teacher gives to them; support bytes counts it as rest",
            ("prefix",),
        )
    return Check("prefix map", "pass", text)


def _named(kind: str) -> str:
    return "this run's texts" if kind == RUN_TEXTS else f"the sample's {kind}"


def _stop_tokens(side: Side) -> str:
    return side.tokens(side.vocabulary.stop_ids)
