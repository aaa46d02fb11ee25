"""Rows, tries and events to run kernels on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch
from torch import Tensor

from gold.bytes.plan import BytePlan
from gold.bytes.trie import ByteTrie
from gold.kernels import BACKENDS, why_not
from gold.kernels.layout import ByteLayout, Columns, KeptEvents, KernelTrie, Tokens
from gold.kernels.reference import MixedKL

CPU = torch.device("cpu")


def _interpreter_fails() -> str:
    try:
        old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    except PackageNotFoundError:
        return ""
    return "the interpreter of triton before 3.7 fails with numpy 2.4" if old else ""


INTERPRETER_FAILS = _interpreter_fails()

BACKENDS_HERE = [
    name for name in BACKENDS if not why_not(name, CPU) and not (name == "cuda" and INTERPRETER_FAILS)
]
"""Back ends that run on CPU tensors."""
FORCED = [pytest.param(name, marks=pytest.mark.slow) if name == "cuda" else name for name in BACKENDS_HERE]
"""Back ends to force on CPU tensors, one after the other; Triton's interpreter takes long."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_like(rows: int, width: int, seed: int) -> Tensor:
    """Logits of all sorts: the second row has columns of probability 0, the third one of probability 1."""
    logits = 3 * torch.randn(rows, width, dtype=torch.float64, generator=generator(seed))
    if rows > 1:
        logits[1, width // 3 : width // 2] = -torch.inf
    if rows > 2:
        logits[2, width // 2] = 90.0
    return logits


@dataclass
class Spelled:
    """As much of a vocabulary as tries and plans need: the bytes of each id, empty for events."""

    tokens: list[bytes]
    stop_ids: tuple[int, ...] = (0,)
    dummy_prefix: bool = False

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tokens)]).astype(np.int64)

    @property
    def blob(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.tokens), np.uint8)

    @property
    def is_special(self) -> np.ndarray:
        return np.array([not t for t in self.tokens])


@dataclass
class Written:
    """A text in given tokens."""

    ids: np.ndarray
    ends: np.ndarray
    data: bytes
    exact: np.ndarray


def layout_of(
    tokens: list[bytes],
    texts: list[list[int]],
    stopped: bool,
    stops: tuple[int, ...],
    device: torch.device = CPU,
) -> ByteLayout:
    vocabulary = Spelled(tokens, stops)
    written = []
    for ids in texts:
        ends = np.cumsum([len(tokens[i]) for i in ids]).astype(np.int64)
        data = b"".join(tokens[i] for i in ids)
        written.append(Written(np.array(ids, np.int32), ends, data, np.ones(len(ids), np.bool_)))
    trie = ByteTrie.of(vocabulary)
    plan = BytePlan.of(vocabulary, trie, written, [stopped] * len(texts))
    return ByteLayout.of(KernelTrie(trie), plan, device)


def random_layout(
    seed: int,
    count: int = 60,
    stopped: bool = True,
    device: torch.device = CPU,
    letters: int = 3,
    longest: int = 4,
    rows: int = 6,
) -> ByteLayout:
    """Tokens of a few bytes, some bytes spelled twice, events at both ends of the ids; two texts of up to ``rows``."""
    draw = np.random.default_rng(seed)
    tokens = [
        bytes(draw.integers(97, 97 + letters, draw.integers(1, longest + 1)).astype(np.uint8))
        for _ in range(count)
    ]
    tokens = [b"", *tokens, tokens[0], b"", b"a", b"b", b"c"]
    texts = [draw.integers(1, len(tokens), draw.integers(rows // 2, rows)).tolist() for _ in range(2)]
    return layout_of(tokens, texts, stopped, (0,), device)


def kept_events(width_V: int, width_W: int, device: torch.device = CPU) -> tuple[KeptEvents, KeptEvents]:
    """Half of the tokens of both sides in random pairs, and stop ids that do not match in number."""
    shared = min(width_V, width_W) // 2
    ids_V = torch.randperm(width_V, generator=generator(1)).to(device)
    ids_W = torch.randperm(width_W, generator=generator(2)).to(device)
    return (
        KeptEvents(ids_V[:shared], ids_V[shared : shared + 2], width_V),
        KeptEvents(ids_W[:shared], ids_W[shared : shared + 1], width_W),
    )


FORMS = [
    MixedKL(student=1.0),
    MixedKL(teacher=1.0),
    MixedKL(student=0.6, student_mix=0.4, teacher=0.4, teacher_mix=0.4),
    MixedKL(student=2.0, teacher=0.7, above_nats=2.0),
    MixedKL(student=1.0, student_mix=0.9),
]


def every_function(
    width: int, device: torch.device = CPU
) -> dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]:
    """Those that take rows, as functions of a back end, logits of three rows, and options."""
    layout = layout_of([b"", b"a", b"ab", b"b", b"ba", b"abab"], [[2, 4, 1]], False, (0,), device)
    kept_V, kept_W = kept_events(width, width, device)
    teacher = rows_like(3, width, 9).clamp(min=-30.0).to(device)
    columns = Columns((torch.arange(width) % 7).to(device), 7)
    target = torch.tensor([0, -1, width - 1], device=device)
    tokens = Tokens(target[:1], target[:1] + 1, target[:1] == 0)
    before = -torch.arange(3.0, device=device)
    return {
        "masses": lambda b, z, **o: b.byte_masses(z, layout, 0, **o),
        "statistics": lambda b, z, **o: b.row_statistics(z, target, target[:1], **o),
        "divergence": lambda b, z, **o: b.row_divergence(z, teacher.to(z), kept_V, kept_W, FORMS[2], **o),
        "common": lambda b, z, **o: b.row_divergence(
            z, teacher.to(z), kept_V, kept_W, FORMS[2], only_common=True, **o
        ),
        "pieces": lambda b, z, **o: b.piece_masses(z, target, columns, target[:1], tokens, **o),
        "hybrid": lambda b, z, **o: b.hybrid_distance(
            z, teacher.to(z), before, before, kept_V, kept_W, FORMS[2], 0.5, **o
        ),
    }
