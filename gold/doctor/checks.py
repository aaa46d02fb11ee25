"""Checks of a pair that need no weights: its tokenizers and the files in their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gold.align.chunks import Alignment, align_tokens
from gold.align.overlap import byte_equal_pairs
from gold.bytes.prefixes import longest_prefixes
from gold.doctor.finding import Check, ClassCoverage, Finding, Report, failure, passed, run_checks, warning
from gold.doctor.sample import JUDGED, RUN_TEXTS, SAMPLE
from gold.doctor.side import Side
from gold.tokenize.compare import differences
from gold.tokenize.families import BYTE_FALLBACK, BYTE_LEVEL
from gold.tokenize.vocabulary import TokenizedText

# Thresholds of the checks
MOST_REPAIRED = 0.5  # fail above: share of bytes that a side's tokens do not reproduce
MOST_CHANGED = 0.01  # warn above: the same share; a normalizer that composes a rare accent stays below
LEAST_ONE_TO_ONE = 0.25  # warn below: share of the student's tokens; real pairs have 0.4 to 0.9 on prose
LONGEST_SPAN_BYTES = 256  # warn above: mean bytes between stable boundaries; over fifty tokens
NEARLY_SAME = 0.98  # warn above: share of ids with the same bytes; two different families never reach it
MOST_WITHOUT_PREFIX = 0.001  # warn above: share of the teacher's tokens without a prefix in the student's
MARKERS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "[TOOL_CALLS]"),
    *("<|python_tag|>", "<|channel|>", "<|call|>", "<｜tool▁calls▁begin｜>"),
)
"""Thinking and tool markers of common families."""

_TOKEN_BASED = ("shared", "one_to_one", "gold")  # options and objectives that compare tokens of equal bytes
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
_NUMBER = re.compile(rb"\d{2,}")


@dataclass(frozen=True)
class _Text:
    """One text tokenized by both sides."""

    student: TokenizedText
    teacher: TokenizedText
    alignment: Alignment


@dataclass(frozen=True)
class _Pair:
    """Both sides, and their texts by class; the class `judged` decides whether the pair passes."""

    student: Side
    teacher: Side
    texts: Mapping[str, list[_Text]]
    coverage: Mapping[str, ClassCoverage]
    judged: str

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.student, self.teacher

    @property
    def all_texts(self) -> list[_Text]:
        return [text for group in self.texts.values() for text in group]

    @cached_property
    def repaired(self) -> dict[str, dict[str, float]]:
        """By side and class: the share of bytes that the side's tokens do not reproduce."""
        return {
            role: {
                kind: getattr(c, f"{role}_repaired_bytes") / max(c.bytes, 1)
                for kind, c in self.coverage.items()
            }
            for role in ("student", "teacher")
        }


def examine_pair(student: Side, teacher: Side, texts: Sequence[str] = ()) -> Report:
    """The report on a pair from its tokenizers and the files in their folders, without loading a model.

    `texts` are those of a run, if there is one: then they decide whether the pair can be trained, and the built-in
    sample only shows where it is weak.
    """
    texts = [text for text in texts if text]
    sample = {**({RUN_TEXTS: texts} if texts else {}), **SAMPLE}
    tokenized = {
        name: [_tokenize(student, teacher, text) for text in group] for name, group in sample.items()
    }
    coverage = {name: _coverage(group) for name, group in tokenized.items()}
    pair = _Pair(student, teacher, tokenized, coverage, RUN_TEXTS if texts else JUDGED)
    known = student.config or teacher.config
    checks = [check for check in PAIR_CHECKS if known or check.answer is not _output_rows]
    unchecked = [] if known else ["output matrix: there is no config.json beside the tokenizers"]
    return Report(run_checks(checks, pair), coverage, unchecked)


def _tokenize(student: Side, teacher: Side, text: str) -> _Text:
    both = student.vocabulary.encode(text), teacher.vocabulary.encode(text)
    return _Text(*both, align_tokens(*both))


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


def _families(pair: _Pair) -> Finding:
    return passed("; ".join(f"{s.role} {s.vocabulary.family}, {s.vocabulary.size:,} ids" for s in pair.sides))


def _vocabularies(pair: _Pair) -> Finding:
    mine, theirs = pair.student.marked, pair.teacher.marked
    if mine.same_as(theirs):
        return passed("identical on both sides, id by id: the teacher scores the student's own tokens")
    ids_V, ids_W = byte_equal_pairs(mine, theirs)
    if int((ids_V == ids_W).sum()) / max(mine.size, theirs.size, 1) > NEARLY_SAME:
        return warning(
            f"almost identical (here is the student): {'; '.join(differences(mine, theirs, limit=2))}",
            "the pair is trained as two vocabularies; if one tokenizer and the same stop ids fit both models, use them",
        )
    size = "of the same size but different" if mine.size == theirs.size else "different"
    texts_V, texts_W = int((~mine.is_special).sum()), int((~theirs.is_special).sum())
    return passed(
        f"{size}: {len(ids_V):,} tokens with the same bytes, {len(ids_V) / max(texts_V, 1):.0%} of the student's, "
        f"{len(ids_V) / max(texts_W, 1):.0%} of the teacher's"
    )


def _output_rows(pair: _Pair) -> Finding:
    found, bad = [], []
    for side in pair.sides:
        rows, size = side.config.get("vocab_size"), side.vocabulary.size
        if not isinstance(rows, int):
            continue
        extra = f" ({rows - size:,} of padding)" if rows > size else f" ({size - rows:,} ids without a row)"
        found.append(f"{side.role} {rows:,} rows for {size:,} ids{'' if rows == size else extra}")
        if lost := int((~side.vocabulary.is_special[rows:]).sum()):
            bad.append(
                f"{side.role}: the tokenizer has {size:,} ids, the output matrix {rows:,} rows, none for {lost:,} "
                "tokens"
            )
    if bad:
        return failure(
            "; ".join(bad),
            "use the tokenizer that came with these weights; if tokens were added to it, resize the embeddings "
            "(resize_token_embeddings) and train them first",
        )
    return passed("; ".join(found))


def _stop_tokens(pair: _Pair) -> Finding:
    found = "; ".join(f"{side.role} {side.tokens(side.vocabulary.stop_ids)}" for side in pair.sides)
    silent = [side for side in pair.sides if not side.vocabulary.stop_ids]
    if lacking := [side.role for side in silent if not side.bare]:
        return failure(
            f"no stop id: {', '.join(lacking)}",
            "name one in roles.stop, or set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json",
        )
    if silent:
        roles = ", ".join(side.role for side in silent)
        return warning(f"a tokenizer file alone names no stop id: {roles}", "give the model's folder instead")
    for side in pair.sides:
        ending = _ending(side)
        if ending is not None and ending not in side.vocabulary.stop_ids:
            return warning(
                f"{found}; but the chat template of the {side.role} ends an answer with {side.tokens((ending,))}",
                "make it a stop token too (roles.stop, or eos_token_id in generation_config.json), else answers run on",
                "messages",
            )
    return passed(found)


def _ending(side: Side) -> int | None:
    """The special token with which a side's template ends an answer, if any."""
    closing = "" if side.turn is None else side.turn.closing.lstrip()
    found = [
        (len(token.content), index)
        for index, token in side.added.items()
        if token.special and closing.startswith(token.content)
    ]
    return max(found)[1] if found else None


def _bos(pair: _Pair) -> Finding:
    found, unused = [], []
    for side in pair.sides:
        index = side.vocabulary.bos_id
        token = "none" if index is None else side.tokens((index,))
        if index is None:
            found.append(f"{side.role} none")
        elif side.puts_bos:
            found.append(f"{side.role} {token}, before every text")
        elif side.turn is not None and token in side.turn.before:
            found.append(f"{side.role} {token}, written by its chat template")
        elif index in side.vocabulary.stop_ids:
            found.append(f"{side.role} none ({token} is its stop token)")
        else:
            found.append(f"{side.role} {token}, which nothing puts before a text")
            unused.append(side.role)
    if unused:
        return warning(
            "; ".join(found),
            f"if the {' or the '.join(unused)} was trained with it, name it in roles.bos, or set add_bos_token: true "
            "in tokenizer_config.json: without its BOS a model may write nonsense",
        )
    return passed("; ".join(found))


def _templates(pair: _Pair) -> Finding:
    have = [side for side in pair.sides if side.template]
    if not have:
        return passed("none on either side: both read messages as a plain transcript")
    if len(have) == 1:
        other = "teacher" if have[0] is pair.student else "student"
        return warning(
            f"only the {have[0].role} has one; the {other} reads messages as a plain transcript",
            f"for conversations use a {other} with a chat template, or give prompts as plain text",
            "messages",
        )
    thinking = [side.role for side in have if side.turn and side.turn.opening.rstrip().endswith("<think>")]
    if len(thinking) == 1:
        return warning(
            f"the template of the {thinking[0]} opens <think> before the answer, the other does not",
            "one model thinks before it answers and the other does not: make both do the same, by template_kwargs "
            "where a template has a switch ({enable_thinking: false} of Qwen3), or by another template",
            "messages",
        )
    if pair.student.template == pair.teacher.template:
        return passed("the same on both sides")
    opaque = ", ".join(side.role for side in have if side.turn is None)
    unread = f" ({opaque}: it refuses a plain question, so it was not examined)" if opaque else ""
    return passed(f"different; each model reads its own{unread}")


def _markers(pair: _Pair) -> Finding:
    kinds = {marker: (pair.student.kind(marker), pair.teacher.kind(marker)) for marker in MARKERS}
    known = {marker: kind for marker, kind in kinds.items() if kind != ("text", "text")}
    if not known:
        return passed("no thinking or tool marker is a token on either side: all are text")
    if alone := [(marker, *kind) for marker, kind in known.items() if kind.count("special token") == 1]:
        return warning(
            ", ".join(f"{marker} (student: {s}, teacher: {t})" for marker, s, t in alone),
            "where one side has a special token, the other reads and writes characters, which the first has hardly "
            "seen: use prompts and templates without them",
        )
    return passed(f"{', '.join(known)}: each side reads what the other writes")


def _bytes(pair: _Pair) -> Finding:
    judged = pair.judged
    lost = {role: share[judged] for role, share in pair.repaired.items() if share[judged] > MOST_REPAIRED}
    if lost:
        return failure(
            f"of {_named(judged)} "
            + " and ".join(
                f"{share:.0%} is not reproduced by the {role}'s tokens" for role, share in lost.items()
            ),
            f"use a {' and a '.join(lost)} whose tokenizer was made for such texts"
            + ("" if judged == RUN_TEXTS else "; gold doctor CONFIG judges a pair by a run's own prompts"),
        )
    found = [line for side in pair.sides if (line := _lacking(side))]
    for role, shares in pair.repaired.items():
        changed = [f"{share:.0%} of {_named(kind)}" for kind, share in shares.items() if share > MOST_CHANGED]
        found += [f"the {role} changes or drops {', '.join(changed)}"] if changed else []
    if not found:
        return passed("both sides have every byte and reproduce every text")
    if judged == RUN_TEXTS and max(shares[judged] for shares in pair.repaired.values()) <= MOST_CHANGED:
        return passed(f"this run's texts are reproduced; elsewhere {'; '.join(found)}")
    return warning(
        "; ".join(found),
        "that side does not see such bytes, no boundary inside them is shared, and they are counted (repaired_share)",
    )


def _lacking(side: Side) -> str:
    """The bytes of UTF-8 that no token of a vocabulary covers; empty if all are covered."""
    vocabulary = side.vocabulary
    single = np.flatnonzero(np.diff(vocabulary.offsets) == 1)
    own = set(vocabulary.blob[vocabulary.offsets[single]].tolist())
    if max(own, default=0) < 0x80 and vocabulary.family not in (BYTE_LEVEL, BYTE_FALLBACK):
        return f"the {side.role} has no byte tokens to fall back on: it cannot read characters outside its vocabulary"
    gone = [byte for byte in _UTF8_BYTES if byte not in own]
    shown = " ".join(f"{byte:02x}" for byte in gone[:8]) + (" …" if len(gone) > 8 else "")
    return (
        f"the {side.role} lacks {len(gone)} of the {len(_UTF8_BYTES)} bytes of UTF-8 ({shown})"
        if gone
        else ""
    )


def _boundaries(pair: _Pair) -> Finding:
    found = pair.coverage[pair.judged]
    if found.chunks == found.texts and min(found.student_tokens, found.teacher_tokens) > found.texts:
        return failure(
            f"none inside {_named(pair.judged)}: no student token ends where a teacher token ends",
            "one of the tokenizers cannot read these texts; look at one with gold align",
        )
    kind, largest = max(pair.coverage.items(), key=lambda item: item[1].largest_chunk_bytes)
    return passed(
        f"one every {found.bytes / max(found.chunks, 1):.1f} bytes of {_named(pair.judged)}; the largest chunk of all "
        f"has {largest.largest_chunk_bytes} bytes ({kind})"
    )


def _one_to_one(pair: _Pair) -> Finding:
    shares = {kind: c.one_to_one_tokens for kind, c in pair.coverage.items()}
    found = f"of the student's tokens: {', '.join(f'{kind} {share:.0%}' for kind, share in shares.items())}"
    if few := [kind for kind, share in shares.items() if share < LEAST_ONE_TO_ONE]:
        advice = f"support: shared compares little of {', '.join(few)}; support: bytes compares every byte"
        return warning(found, advice, *_TOKEN_BASED)
    return passed(found)


def _digits(pair: _Pair) -> Finding:
    """Compares the boundaries inside each run of digits that both sides reproduce."""
    numbers = apart = 0
    longest = [1, 1]
    for text in pair.all_texts:
        sides = (text.student, text.teacher)
        exact = np.logical_and(*(np.repeat(side.exact, side.ends - side.starts) for side in sides))
        for number in _NUMBER.finditer(text.student.data):
            first, last = number.span()
            if not exact[first:last].all():
                continue
            inner = [side.ends[(side.ends > first) & (side.ends < last)].tolist() for side in sides]
            numbers += 1
            apart += inner[0] != inner[1]
            widths = [np.diff([first, *ends, last]).max() for ends in inner]
            longest = [max(both) for both in zip(longest, widths, strict=True)]
    if not numbers:
        return passed("no number that both sides can read")
    shown = ", ".join(
        f"{role} digit by digit" if most == 1 else f"{role} up to {most} digits a token"
        for role, most in zip(("student", "teacher"), longest, strict=True)
    )
    if apart:
        return warning(
            f"{apart} of {numbers} numbers are split differently: {shown}",
            "with support: shared numbers are hardly taught at all; support: bytes teaches every digit",
            *_TOKEN_BASED,
        )
    return passed(f"{numbers} numbers, all split alike: {shown}")


def _stable(pair: _Pair) -> Finding:
    spans = size = 0
    for text in pair.all_texts if pair.judged == JUDGED else pair.texts[pair.judged]:
        stable = text.teacher.ends[pair.teacher.vocabulary.stable_ends(text.teacher)]
        spans += len(np.intersect1d(stable, text.alignment.ends_C))
        size += len(text.student.data)
    found = f"{spans or 'none'} in {size:,} bytes"
    if size > LONGEST_SPAN_BYTES * spans:
        return warning(
            f"{found}: hardly anywhere does the teacher's tokenizer end a token whatever text follows",
            "span_pg would give a whole text one advantage, mostly noise; use a divergence with support: bytes",
            "span_pg",
            "span",
        )
    return passed(f"{found}: span_pg has a span every {size / spans:.0f} bytes")


def _prefixes(pair: _Pair) -> Finding:
    prefixes = longest_prefixes(pair.student.marked, pair.teacher.marked)
    text_W = ~pair.teacher.marked.is_special
    texts = max(int(text_W.sum()), 1)
    none = int((prefixes.ids_W[text_W] < 0).sum())
    whole = int((prefixes.rest_bytes_W[text_W] == 0).sum())
    byte = int(((prefixes.prefix_bytes_W == 1) & (prefixes.rest_bytes_W > 0))[text_W].sum())
    found = (
        f"{whole / texts:.0%} of the teacher's tokens are student tokens, {(texts - whole - none) / texts:.0%} start "
        f"with a shorter one ({byte:,} with a single byte), {none:,} with none"
    )
    if none > MOST_WITHOUT_PREFIX * texts:
        return warning(
            found,
            "support: prefix cannot use the probability that the teacher gives to these; support: bytes counts it as "
            "unresolved",
            "prefix",
        )
    return passed(found)


def _named(kind: str) -> str:
    return "this run's texts" if kind == RUN_TEXTS else f"the sample's {kind}"


PAIR_CHECKS: tuple[Check[_Pair], ...] = (
    Check("tokenizers", "Of which family, and how large, is each tokenizer?", _families),
    Check("vocabulary", "How many tokens have the same bytes on both sides?", _vocabularies),
    Check("output matrix", "Does every token have a row in its model's output matrix?", _output_rows),
    Check("stop tokens", "Does the chat template end an answer with a stop token?", _stop_tokens),
    Check("BOS", "Is the BOS token that a model was trained with put before its texts?", _bos),
    Check("chat template", "Have both sides a chat template, both thinking or both not?", _templates),
    Check("markers", "Are thinking and tool markers the same kind of token on both sides?", _markers),
    Check("bytes", "Do the tokens of both sides reproduce the bytes of a text?", _bytes),
    Check("shared boundaries", "How often do both sides end a token at the same byte?", _boundaries),
    Check("one-to-one tokens", "What share of the student's tokens are also one teacher token?", _one_to_one),
    Check("digits", "Do both sides split numbers alike?", _digits),
    Check("stable boundaries", "How often does the teacher end a token whatever follows?", _stable),
    Check("prefixes", "Does each teacher token begin with a student token?", _prefixes),
)
