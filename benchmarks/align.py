"""`python -m benchmarks align`: time per token from ids to chunks, for pairs of real tokenizers, beside two others.

The tokens of both sides are counted. `gold` is what is left to do once both sides have ids: where every token ends in
bytes, and the chunks. Joining the bytes of both sides and comparing them is timed apart, and so is tokenizing. `python`
is the same walk in a few lines of plain Python. `TRL` is the alignment of its GOLD trainer: `walk` makes groups of
tokens of byte offsets, `offsets` makes these of the student's ids and the teacher's encodings; tokenizing is left out.
Everything is timed in turn, in one process, on the same texts, each by itself and all of them as one long text.
Whether TRL's groups are the chunks is counted on these texts and on odd ones that both tokenizers encode exactly.

TRL needs an environment of its own; elsewhere its columns say that it is not installed:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt torch trl==1.16.0 -e .
    .venv-peers/bin/python -m benchmarks align --record
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numba  # noqa: F401 - once it is loaded, short texts take the compiled walks too, as in training

from benchmarks.assets import tokenizer_path
from benchmarks.clock import Spread, seconds_in_turn, spread
from benchmarks.record import device_name, write_record
from benchmarks.texts import odd_text, plain_texts
from gold.align.chunks import Alignment, chunks_of
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

PAIRS = (
    ("qwen3", "llama3_1"),
    ("qwen3", "gemma3"),
    ("gemma3", "gptoss"),
    ("smollm2-135m-instruct", "qwen3"),
)
TEXT_BYTES = 4096
ODD_TEXTS = 2000

Work = Callable[[], object]
LazyLogits = list[tuple[int, ...]]


@dataclass(frozen=True)
class Measurement:
    """What was found for one pair on texts of one size; times are nanoseconds per token of either side.

    `times_gold` are ratios to `gold` of the same round. `trl_groups`: see `Trl.groups`.
    """

    student: str
    teacher: str
    texts: str
    tokens: int
    chunks: int
    one_to_one_chunks: int
    ns_per_token: dict[str, Spread]
    times_gold: dict[str, Spread]
    trl_groups: dict[str, dict[str, int]]


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks align",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--texts", type=int, default=256, help="how many texts of 4 kB (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="how often everything is timed (%(default)s)")
    parser.add_argument(
        "--record", action="store_true", help="keep the result in benchmarks/results/align.json"
    )
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    plain = plain_texts(given.texts, TEXT_BYTES)
    odd = [text for n in range(ODD_TEXTS) if isinstance(text := odd_text(random.Random(n)), str)]
    trl = trl_version()
    print(f"TRL: {trl or 'not installed'}\n\n{HEAD}", flush=True)
    found = []
    for names in PAIRS:
        student, teacher = (Vocabulary.load(tokenizer_path(name)) for name in names)
        peer = Trl(*names) if trl else None
        for shape, texts in ((f"{given.texts} of 4 kB", plain), ("as one", ["".join(plain)])):
            measured = measure(names, shape, student, teacher, texts, odd, peer, given.rounds)
            print(table_row(measured), flush=True)
            found.append(measured)
    if given.record:
        data = {"trl": trl, "rounds": given.rounds, "pairs": [asdict(measured) for measured in found]}
        command = f"python -m benchmarks align --texts {given.texts} --rounds {given.rounds} --record"
        seconds = time.perf_counter() - started
        print(write_record("align", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


HEAD = (
    "| student – teacher | texts | one to one | gold | bytes equal | tokenizing | python | TRL walk "
    "| TRL offsets, walk | TRL's groups right: plain, odd |\n" + "|---" * 10 + "|"
)


def table_row(found: Measurement) -> str:
    """A line of the table under `HEAD`: nanoseconds per token, and in brackets how many times that of gold."""

    def cell(name: str) -> str:
        if name not in found.ns_per_token:
            return "–"
        times = f" ({found.times_gold[name].median:,.0f}×)" if name in found.times_gold else ""
        ns = found.ns_per_token[name].median
        return f"{ns:,.2f}{times}" if ns < 20 else f"{ns:,.0f}{times}"

    groups = ", ".join(f"{c['equal']} of {sum(c.values())}" for c in found.trl_groups.values())
    times = [cell(name) for name in ("gold", "bytes", "tokenizing", "python", "trl_walk", "trl")]
    share = f"{2 * found.one_to_one_chunks / found.tokens:.0%}"
    return (
        f"| {' | '.join((f'{found.student} – {found.teacher}', found.texts, share, *times, groups or '–'))} |"
    )


def measure(
    names: tuple[str, str],
    shape: str,
    student: Vocabulary,
    teacher: Vocabulary,
    texts: Sequence[str],
    odd: Sequence[str],
    peer: Trl | None,
    rounds: int,
) -> Measurement:
    """All the times of one pair on these texts.

    Raises: ValueError if a tokenizer does not encode one of the texts byte by byte.
    """
    sides = [[vocabulary.encode(text) for text in texts] for vocabulary in (student, teacher)]
    for name, side in zip(names, sides, strict=True):
        for text, tokenized in zip(texts, side, strict=True):
            if not tokenized.exact.all():
                raise ValueError(f"{name} changes {text[:40]!r}…: the pair needs other texts")
    pairs = list(zip(*sides, strict=True))
    ids = [(one.ids, other.ids) for one, other in pairs]
    tokens = sum(len(one) + len(other) for one, other in pairs)
    lengths = [
        [len(vocabulary.token_bytes(i)) for i in range(vocabulary.size)] for vocabulary in (student, teacher)
    ]
    lists = [(one.tolist(), other.tolist()) for one, other in ids]

    def gold() -> list[Alignment]:
        return [
            chunks_of(ends := student.ends(ids_S), teacher.ends(ids_T), int(ends[-1])) for ids_S, ids_T in ids
        ]

    def same_bytes() -> bool:
        return all(student.decode(ids_S).data == teacher.decode(ids_T).data for ids_S, ids_T in ids)

    def python() -> list[LazyLogits]:
        return [python_chunks(ids_S, ids_T, *lengths) for ids_S, ids_T in lists]

    def tokenizing() -> None:
        for vocabulary in (student, teacher):
            for text in texts:
                vocabulary.tokenizer.encode(text, add_special_tokens=False)

    chunks = gold()
    rows = [_rows(alignment) for alignment in chunks]
    if not same_bytes() or python() != rows:
        raise AssertionError(f"{names}: the chunks are not those of plain Python")
    works: dict[str, Work] = {"gold": gold, "bytes": same_bytes, "python": python, "tokenizing": tokenizing}
    groups: dict[str, dict[str, int]] = {}
    if peer is not None:
        works |= peer.works(texts, pairs)
        groups["plain"] = peer.groups(texts, pairs)
        groups["odd"] = peer.groups(*_exact_in_both(odd, student, teacher))
    seconds = seconds_in_turn(works, rounds)
    if "trl_offsets" in seconds:
        seconds["trl"] = [a + b for a, b in zip(seconds.pop("trl_offsets"), seconds["trl_walk"], strict=True)]
    return Measurement(
        *names,
        shape,
        tokens,
        sum(map(len, chunks)),
        sum(int(alignment.one_to_one_C.sum()) for alignment in chunks),
        {name: spread([s / tokens * 1e9 for s in values]) for name, values in seconds.items()},
        {
            name: spread([s / base for s, base in zip(values, seconds["gold"], strict=True)])
            for name, values in seconds.items()
            if name != "gold"
        },
        groups,
    )


def python_chunks(
    ids_S: Sequence[int], ids_T: Sequence[int], lengths_V: Sequence[int], lengths_W: Sequence[int]
) -> LazyLogits:
    """The chunks of two tokenizations of the same bytes, none of their tokens of zero width."""
    ends_S = list(accumulate(lengths_V[index] for index in ids_S))
    ends_T = list(accumulate(lengths_W[index] for index in ids_T))
    rows: LazyLogits = []
    i = j = s = t = 0
    while i < len(ends_S):
        end_S, end_T = ends_S[i], ends_T[j]
        i += end_S <= end_T
        j += end_T <= end_S
        if end_S == end_T:
            rows.append((s, i, t, j))
            s, t = i, j
    return rows


def trl_version() -> str | None:
    """The version of TRL, None where it is not installed."""
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return None


class Trl:
    """The alignment of TRL's GOLD trainer for one pair of tokenizers."""

    def __init__(self, student: str, teacher: str) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        trainer = import_module("trl.experimental.gold.gold_trainer")
        load = import_module("transformers").AutoTokenizer.from_pretrained
        self._student, self._teacher = (
            load(tokenizer_path(name), trust_remote_code=False) for name in (student, teacher)
        )
        self._walk = trainer.ULDLoss._align_by_byte_offsets
        self._add_offsets = trainer.GOLDTrainer._maybe_add_completion_byte_offsets
        self._encode = trainer.encode_with_byte_offsets
        loss = SimpleNamespace(use_extended_uld=True)
        self._trainer = SimpleNamespace(
            use_uld_loss=True, teacher_tokenizer=self._teacher, uld_loss_fn=loss, _tokenizer=self._student
        )

    def works(
        self, texts: Sequence[str], pairs: Sequence[tuple[TokenizedText, TokenizedText]]
    ) -> dict[str, Work]:
        """`trl_walk` on offsets that are right, and `trl_offsets` if it makes any for this teacher."""
        offsets = [(_offsets(one), _offsets(other)) for one, other in pairs]
        works: dict[str, Work] = {"trl_walk": lambda: [self._walk(*both) for both in offsets]}
        backend = self._teacher.backend_tokenizer
        encoded = [_Encoded(backend, text) for text in texts]
        slices = [self._slice(one) for one, _ in pairs]

        def make() -> None:
            for piece, ready, text in zip(slices, encoded, texts, strict=True):
                self._student_offsets(piece)
                self._encode(ready, [text])

        try:
            make()
        except NotImplementedError:
            return works
        return works | {"trl_offsets": make}

    def groups(
        self, texts: Sequence[str], pairs: Sequence[tuple[TokenizedText, TokenizedText]]
    ) -> dict[str, int]:
        """How many of the texts it cuts into the chunks, into others, or not at all.

        Under "special" are those in which its teacher reads other tokens than `gold`, which takes all text for text.
        """
        counts: Counter[str] = Counter(equal=0, different=0, special=0, refused=0)
        for text, (one, other) in zip(texts, pairs, strict=True):
            try:
                [(ids, offsets)] = self._encode(self._teacher.backend_tokenizer, [text])
                groups = self._walk(self._student_offsets(self._slice(one)), offsets)
            except (NotImplementedError, ValueError):
                counts["refused"] += 1
                continue
            rows = [(s[0], s[-1] + 1, t[0], t[-1] + 1) for s, t in zip(*groups, strict=True) if s and t]
            right = _rows(chunks_of(one.ends, other.ends, len(one.data)))
            same = ids == other.ids.tolist()
            counts["special" if not same else "equal" if rows == right else "different"] += 1
        return dict(counts)

    def _slice(self, tokenized: TokenizedText) -> dict[str, Any]:
        ids = import_module("torch").tensor([tokenized.ids.tolist()])
        return {"input_ids": ids, "labels": ids}

    def _student_offsets(self, piece: dict[str, Any]) -> list[list[int]]:
        self._add_offsets(self._trainer, piece)
        offsets: list[list[int]] = piece["byte_offsets"][0].tolist()
        return offsets


class _Encoded:
    """A tokenizer that has done its work: it answers with what it was asked when it was made."""

    def __init__(self, backend: Any, text: str) -> None:
        self.pre_tokenizer, self.decoder = backend.pre_tokenizer, backend.decoder
        self._encodings = backend.encode_batch([text], add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> Any:
        """The encoding of the one text."""
        return self._encodings


def _offsets(tokenized: TokenizedText) -> list[list[int]]:
    return [list(both) for both in zip(tokenized.starts.tolist(), tokenized.ends.tolist(), strict=True)]


def _rows(alignment: Alignment) -> LazyLogits:
    return [tuple(row) for row in alignment.chunks.tolist()]


def _exact_in_both(
    texts: Sequence[str], student: Vocabulary, teacher: Vocabulary
) -> tuple[list[str], list[tuple[TokenizedText, TokenizedText]]]:
    """The texts that both tokenizers encode exactly, and their tokens."""
    read = [(text, student.encode(text), teacher.encode(text)) for text in texts if text]
    kept = [(text, one, other) for text, one, other in read if one.exact.all() and other.exact.all()]
    return [text for text, _, _ in kept], [(one, other) for _, one, other in kept]
