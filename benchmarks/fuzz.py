"""`python -m benchmarks fuzz [--texts N]`: alignments of random texts by every tokenizer, held to what they must be.

Each case is one text and a few tokenizers, drawn from the seed and the number of the case alone; one of the tokenizers
also gives ids that it would never choose itself. What is checked is written below without the code that is under test:
sets of ends, and bytes joined one token after the other. A case that fails is printed with the command that runs it
again, the smallest number first, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import accumulate, combinations, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.assets import MODELS, ROOT, TOKENIZERS, listing, tokenizer_path
from benchmarks.record import device_name, write_record
from benchmarks.texts import FORGED, odd_text
from gold.align.chunks import align_tokens
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

TOKENIZERS_A_TEXT = 2
BLOCK = 250
PADDING_ROWS = 64


class Subject:
    """A tokenizer under test, with the bytes of its ids at hand."""

    def __init__(self, name: str, vocabulary: Vocabulary) -> None:
        self.name, self.vocabulary = name, vocabulary
        data, offsets = vocabulary.blob.tobytes(), vocabulary.offsets.tolist()
        self.pieces = [data[start:end] for start, end in pairwise(offsets)]
        self.special = frozenset(np.flatnonzero(vocabulary.is_special).tolist())
        self.id_of = {piece: index for index, piece in enumerate(self.pieces) if piece}
        self.tokenizer = vocabulary.tokenizer
        if self.tokenizer.truncation or self.tokenizer.padding:
            self.tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        self.space_after = vocabulary.space_after_words
        unk = None if vocabulary.unk_id is None else self.tokenizer.id_to_token(vocabulary.unk_id)
        self.unk = None if unk is None else unk.encode()
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.forged = sorted(token.content for token in added)
        # Nothing that this tokenizer does to a text changes its bytes, as long as they are valid UTF-8.
        self.faithful = (
            self.tokenizer.normalizer is None
            and all(bytes([byte]) in self.id_of for byte in range(256))
            and not any(token.lstrip or token.rstrip for token in added)
            and _keeps_bytes(self.tokenizer.pre_tokenizer)
        )


@dataclass(frozen=True)
class Case:
    """One text, the tokenizers that read it, whether each does so at the start of a sequence, and ids of the first."""

    text: str | bytes
    subjects: tuple[Subject, ...]
    at_start: tuple[bool, ...]
    ids: tuple[int, ...]


@dataclass
class Counts:
    """What one tokenizer has read; the bytes are those of texts that are valid UTF-8."""

    texts: int = 0
    tokens: int = 0
    inexact_tokens: int = 0
    bytes: int = 0
    repaired_bytes: int = 0

    def add(self, other: Counts) -> None:
        """Adds the counts of other texts."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Tally:
    """What was checked: cases, pairs of tokenizations, and the counts of each tokenizer."""

    cases: int = 0
    pairs: int = 0
    tokenizers: dict[str, Counts] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Adds what was checked elsewhere."""
        self.cases += other.cases
        self.pairs += other.pairs
        for name, counts in sorted(other.tokenizers.items()):
            self.tokenizers.setdefault(name, Counts()).add(counts)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__)
    parser.add_argument("--texts", type=int, default=20_000, help="how many cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long, at the latest")
    parser.add_argument("--processes", type=int, default=2, help="how many processes (%(default)s)")
    parser.add_argument("--case", type=int, help="run this case alone, and shorten it if it fails")
    parser.add_argument("--trained-only", action="store_true", help="only tokenizers trained in the process")
    parser.add_argument(
        "--record", action="store_true", help="keep the result in benchmarks/results/fuzz.json"
    )
    given = parser.parse_args(list(arguments))
    if not __debug__:
        parser.error("python -O leaves out the checks")
    again = "python -m benchmarks fuzz" + " --trained-only" * given.trained_only + f" --seed {given.seed}"
    if given.case is not None:
        return _run_case(given.seed, given.case, given.trained_only)
    started = time.perf_counter()
    tally, failure = _run(given.seed, given.texts, given.minutes, given.processes, given.trained_only)
    seconds = time.perf_counter() - started
    pairs = f"{tally.pairs:,} pairs of tokenizations"
    print(f"{tally.cases:,} texts, {pairs}, {seconds:.0f} s\n\n{table(tally)}\n")
    if failure is not None:
        number, what = failure
        print(f"error: case {number}: {what[:400]}; run it again: {again} --case {number}", file=sys.stderr)
        return 1
    if given.record:
        data = {
            "texts": tally.cases,
            "pairs": tally.pairs,
            "failures": 0,
            "seed": given.seed,
            "tokenizers": {name: vars(counts) for name, counts in tally.tokenizers.items()},
        }
        command = f"{again} --texts {given.texts} --processes {given.processes} --record"
        device = device_name("cpu", 1) + f" a process, {given.processes} processes" * (given.processes > 1)
        print(write_record("fuzz", data, command=command, seconds=seconds, device=device))
    return 0


def table(tally: Tally) -> str:
    """What each tokenizer has read, as a Markdown table."""
    lines = ["| tokenizer | texts | tokens | not exact | bytes repaired |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {c.texts:,} | {c.tokens:,} | {c.inexact_tokens / max(c.tokens, 1):.2%} | "
        f"{c.repaired_bytes / max(c.bytes, 1):.2%} |"
        for name, c in tally.tokenizers.items()
    ]
    return "\n".join(lines)


def subjects(trained_only: bool = False) -> list[Subject]:
    """The tokenizers under test: all that the tests train, and the real ones that were fetched."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    families = import_module("support.tokenizers").families()
    found = [Subject(name, Vocabulary.load(tokenizer)) for name, tokenizer in families.items()]
    if not trained_only:
        there = {asset.split("/")[-1] for asset, state in listing() if state == "there"}
        found += [
            Subject(name, Vocabulary.load(tokenizer_path(name)))
            for name in (*TOKENIZERS, *MODELS)
            if name in there
        ]
    return found


def draw(seed: int, number: int, tokenizers: Sequence[Subject]) -> Case:
    """The case of that number."""
    rng = random.Random(f"{seed}:{number}")
    chosen = tuple(rng.choices(tokenizers, k=TOKENIZERS_A_TEXT))
    text = odd_text(rng, chosen[-1].forged or FORGED)
    at_start = tuple(rng.random() < 0.5 for _ in chosen)
    return Case(text, chosen, at_start, tuple(_odd_ids(rng, chosen[0], text)))


def check(case: Case, tally: Tally) -> None:
    """Counts a case for which everything holds.

    Raises: AssertionError, saying what does not.
    """
    tally.cases += 1
    sides = list(zip(case.subjects, case.at_start, strict=True))
    read = [_read(*side, case.text, tally) for side in sides]
    for (i, one), (j, other) in combinations(enumerate(read), 2):
        with _about(f"{sides[i][0].name} beside {sides[j][0].name}"):
            _check_alignment(one, other)
    with _about(f"ids {list(case.ids[:8])}… of {sides[0][0].name}"):
        sampled = _check_ids(*sides[0], case.ids)
    for side in sides[1:]:
        other = _read(*side, sampled.data, tally)
        with _about(f"ids of {sides[0][0].name} beside {side[0].name}"):
            _check_alignment(sampled, other)
    tally.pairs += len(read) * (len(read) - 1) // 2 + len(sides[1:])


def _read(subject: Subject, at_start: bool, text: str | bytes, tally: Tally) -> TokenizedText:
    with _about(subject.name):
        return _check_reading(subject, at_start, text, tally)


def _check_reading(subject: Subject, at_start: bool, text: str | bytes, tally: Tally) -> TokenizedText:
    """The tokens of a text cover its bytes, none is special, and an exact one has the bytes that it covers."""
    vocabulary = subject.vocabulary
    tokenized = vocabulary.encode(text, at_start=at_start)
    data = _bytes_of(text)
    ids, exact = tokenized.ids.tolist(), tokenized.exact.tolist()
    _check_ends(tokenized, data)
    forged = subject.special.intersection(ids) - {vocabulary.unk_id}
    assert not forged, f"text became the special tokens {sorted(forged)}"
    starts = [0, *tokenized.ends.tolist()]
    known = [i for i, is_exact in enumerate(exact) if is_exact]
    wrong = [i for i in known if subject.pieces[ids[i]] != data[starts[i] : starts[i + 1]]]
    assert not wrong, f"tokens {wrong[:5]} are called exact and have other bytes than the text"
    covered = sum(starts[i + 1] - starts[i] for i in known)
    gap = len(data) - tokenized.repaired_bytes - covered
    # The token that has the space put before or after a text is not exact, and its bytes do not count as repaired.
    spaced = (vocabulary.dummy_prefix or subject.space_after) and len(known) < len(ids)
    assert gap == 0 or (gap > 0 and spaced), (
        f"{tokenized.repaired_bytes} bytes repaired, {covered} exact of {len(data)}"
    )
    valid = _is_utf8(data)
    if subject.faithful and valid:
        assert not tokenized.repaired_bytes, (
            f"{tokenized.repaired_bytes} bytes are repaired, though nothing changes them"
        )
        assert len(known) == len(ids) or spaced, "tokens are not exact, though nothing changes the text"
    if valid and (at_start or not vocabulary.dummy_prefix):
        own = subject.tokenizer.encode(data.decode(), add_special_tokens=False).ids
        # Where it takes text for a special token, it is not to be followed.
        parsed = not subject.special.isdisjoint(set(own) - {vocabulary.unk_id})
        parsed = parsed or (subject.unk is not None and subject.unk in data)
        assert parsed or own == ids, f"the ids are {ids}, the tokenizer's own {own}"
    alone = align_tokens(tokenized, tokenized).chunks.tolist()
    # Of tokens that end at the same byte, only the first ends a chunk.
    one_each = [[i, i + 1, i, i + 1] for i in range(len(ids))]
    assert len(set(starts)) <= len(ids) or alone == one_each, f"beside itself its chunks are {alone}"
    counts = tally.tokenizers.setdefault(subject.name, Counts())
    size, repaired = (len(data), tokenized.repaired_bytes) if valid else (0, 0)
    counts.add(Counts(1, len(ids), len(ids) - len(known), size, repaired))
    return tokenized


def _check_ids(subject: Subject, at_start: bool, ids: Sequence[int]) -> TokenizedText:
    """Any ids decode to their bytes one after the other, less the space that is put before or after a text."""
    size = subject.vocabulary.size
    tokenized = subject.vocabulary.decode(ids, at_start=at_start, rows=size + PADDING_ROWS)
    pieces = [subject.pieces[index] if index < size else b"" for index in ids]
    data = b"".join(pieces)
    first = int(at_start and subject.vocabulary.dummy_prefix and data.startswith(b" "))
    last = len(data) - int(subject.space_after and data.endswith(b" "))
    _check_ends(tokenized, data[first:last])
    assert tokenized.ids.tolist() == list(ids), f"decoding changed the ids to {tokenized.ids.tolist()}"
    sums = [min(max(first, end), last) - first for end in accumulate(map(len, pieces))]
    assert tokenized.ends.tolist() == sums, (
        f"the ends are {tokenized.ends.tolist()}, the sums of lengths {sums}"
    )
    # The token that lost the space behind the text is not exact, and counts as repaired.
    shortened = tokenized.repaired_bytes if last < len(data) else 0
    assert tokenized.repaired_bytes == shortened, (
        f"{tokenized.repaired_bytes} bytes of sampled ids are called repaired"
    )
    return tokenized


def _check_ends(tokenized: TokenizedText, data: bytes) -> None:
    ends = tokenized.ends.tolist()
    assert tokenized.data == data, f"the bytes are {tokenized.data!r} instead of {data!r}"
    assert len(ends) == len(tokenized.ids), f"{len(ends)} ends for {len(tokenized.ids)} tokens"
    assert ends == sorted(ends), f"the ends {ends} decrease"
    assert not ends or (ends[0] >= 0 and ends[-1] == len(data)), (
        f"the ends {ends} are not within 0 to {len(data)}"
    )


def _check_alignment(one: TokenizedText, other: TokenizedText) -> None:
    """Chunks end where both sides end, hold every token once, and do not depend on which side is which."""
    there, back = align_tokens(one, other), align_tokens(other, one)
    length = len(one.data)
    shared = sorted({0, length} | (set(one.ends.tolist()) & set(other.ends.tolist())))
    if not length or not len(one) + len(other):
        shared = [0] * (1 + (len(one) + len(other) > 0))  # one chunk for special tokens alone
    edges = [0, *there.ends_C.tolist()]
    assert edges == shared, f"the chunks end at {edges[1:]}, both sides do at {shared[1:]}"
    rows = there.chunks.tolist()
    for side, begin, end, owners in ((one, 0, 1, there.chunk_S), (other, 2, 3, there.chunk_T)):
        members = [i for row in rows for i in range(row[begin], row[end])]
        assert members == list(range(len(side))), f"the chunks have the tokens {members} of {len(side)}"
        # A token is in the chunk that has its first byte, or if it has none the byte after it.
        expected = [min(bisect_right(edges, start), len(rows)) - 1 for start in side.starts.tolist()]
        found = [c for c, row in enumerate(rows) for _ in range(row[begin], row[end])]
        assert found == expected, f"the tokens are in the chunks {found}, their bytes in {expected}"
        assert owners.tolist() == found, f"the tokens name the chunks {owners.tolist()}, and are in {found}"
    swapped = back.chunks[:, [2, 3, 0, 1]].tolist(), [0, *back.ends_C.tolist()]
    assert swapped == (rows, edges), f"the sides swapped give the chunks {swapped[0]} instead of {rows}"


def _keeps_bytes(pre_tokenizer: Any) -> bool:
    """Whether a pre-tokenizer gives each byte of a text its symbol, but for a space before the text."""
    sample = "a, b  c\n日本 1.5\tdon't (x)"
    symbols = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(sample)[0][0]
    pieces = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(sample)) if pre_tokenizer else ""
    return pieces in (symbols, "Ġ" + symbols)


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Failures inside, exceptions included, name what they are about."""
    try:
        yield
    except AssertionError as failure:
        raise AssertionError(f"{what}: {failure}") from None
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _bytes_of(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _odd_ids(rng: random.Random, subject: Subject, text: str | bytes) -> list[int]:
    """Ids that a model could sample: any at all, or the text cut into tokens at random."""
    data = _bytes_of(text)
    if rng.random() < 0.5:
        cut = _cut_at_random(rng, subject.id_of, data[:200])
        if cut is not None:
            return cut
    rows = subject.vocabulary.size + PADDING_ROWS * (rng.random() < 0.1)
    return [rng.randrange(rows) for _ in range(rng.randint(0, 30))]


def _cut_at_random(rng: random.Random, id_of: dict[bytes, int], data: bytes) -> list[int] | None:
    """Ids that stand for the data, drawn one after the other; None where the vocabulary has no token that fits."""
    ids, at = [], 0
    while at < len(data):
        fitting = [end for end in range(at + 1, min(at + 16, len(data)) + 1) if data[at:end] in id_of]
        if not fitting:
            return None
        end = rng.choice(fitting)
        ids.append(id_of[data[at:end]])
        at = end
    return ids


def _run(
    seed: int, texts: int, minutes: float | None, processes: int, trained_only: bool
) -> tuple[Tally, tuple[int, str] | None]:
    """What was checked, and the first case that fails with what does not hold."""
    blocks = [range(at, min(at + BLOCK, texts)) for at in range(0, texts, BLOCK)]
    results: Iterator[tuple[Tally, tuple[int, str] | None]]
    tally, started = Tally(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        if processes > 1:
            pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), _start, (seed, trained_only)
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_run_block, blocks)
        else:
            _start(seed, trained_only)
            results = map(_run_block, blocks)
        for found, failure in results:
            tally.add(found)
            seconds = time.perf_counter() - started
            _show(tally.cases, texts, seconds)
            if failure is not None:
                return tally, failure
            if minutes is not None and seconds > 60 * minutes:
                break
    return tally, None


_started: tuple[int, list[Subject]]


def _start(seed: int, trained_only: bool) -> None:
    global _started
    import numba  # noqa: F401 - once it is loaded, short texts take the compiled walks too, as in training

    _started = seed, subjects(trained_only)


def _run_block(numbers: range) -> tuple[Tally, tuple[int, str] | None]:
    """What was checked up to the first failure, if there is one."""
    tally = Tally()
    seed, tokenizers = _started
    for number in numbers:
        try:
            check(draw(seed, number, tokenizers), tally)
        except AssertionError as failure:
            return tally, (number, str(failure))
    return tally, None


def _show(done: int, texts: int, seconds: float) -> None:
    left = math.ceil(seconds / max(done, 1) * (texts - done) / 60)
    line = f"{done:,} of {texts:,} texts, {done / seconds:,.0f} a second, {left} min left"
    if sys.stderr.isatty():
        print(f"\r{line}  ", end="\n" if done == texts else "", file=sys.stderr, flush=True)
    elif done * 20 // texts > (done - BLOCK) * 20 // texts:
        print(line, file=sys.stderr, flush=True)


def _run_case(seed: int, number: int, trained_only: bool) -> int:
    """Exit status; shows the case, and if it fails the shortest text and ids that still do."""
    case = draw(seed, number, subjects(trained_only))
    what = _failure(case)
    for shown in (case, _shortened(case)) if what else (case,):
        readers = [
            f"{s.name}{'' if at_start else ' (inside)'}"
            for s, at_start in zip(shown.subjects, shown.at_start, strict=True)
        ]
        print(f"text {shown.text!r}\nread by {', '.join(readers)}")
        print(f"ids {list(shown.ids)} of {shown.subjects[0].name}")
        found = _failure(shown)
        print(f"fails: {found}\n" if found else "holds")
    return 1 if what else 0


def _shortened(case: Case) -> Case:
    """The case with as much of its text and ids taken away as it still fails without."""
    for name in ("text", "ids"):
        width = len(getattr(case, name))
        while width:
            at = 0
            while at < len(value := getattr(case, name)):
                shorter = replace(case, **{name: value[:at] + value[at + width :]})
                if _failure(shorter):
                    case = shorter
                else:
                    at += width
            width = width // 2 if width > 40 else width - 1
    return case


def _failure(case: Case) -> str | None:
    try:
        check(case, Tally())
    except AssertionError as failure:
        return str(failure)
    return None
