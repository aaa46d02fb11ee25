"""`python -m benchmarks loss`: a loss over two vocabularies with its gradients, beside plain torch, TRL and Liger.

Given are one long completion as both real tokenizers read it, random hidden states of either side and both output
matrices; asked for are the loss and its gradients with respect to the student's states and matrix. The index arrays of
the text are made anew in every call. States are made so that some rows are sure of their token and some are not.

- `naive torch` stores both [T, V] tensors of logits and lets autograd do the rest.
- `TRL GOLD` is the loss of TRL's GOLD trainer with its defaults, on the logits of the same states.
- `from logits`: both sides' logits are given, and the gradient is asked for with respect to the student's.
- Where both vocabularies are one: the chunked losses of TRL and Liger, from states as ours.

Everything runs in turn in one process, on inputs drawn anew in each round. Memory is the peak over inputs and
gradients. GFLOP/s are the operations that cannot be done without, ``2 (N_S D_S V + N_T D_T W) + 4 N_S D_S V`` for the N
rows of either side that count, per second; the share is that of a large square matrix product timed in the same rounds,
and `matrix products` is what these operations alone take. Errors are those of the value and of the gradients against
float64, relative. A baseline that takes longer than the limit, or does not fit, is said so, never extrapolated.

TRL and Liger need an environment of their own (see `python -m benchmarks align --help`):

    .venv-peers/bin/python -m benchmarks loss --record
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.assets import tokenizer_path
from benchmarks.clock import Spread, spread
from benchmarks.meter import MIB, Meter, Sample
from benchmarks.record import RESULTS, command_line, device_name, write_record
from benchmarks.texts import plain_texts
from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.errors import GoldError
from gold.kernels import use_backend
from gold.kernels.logits import GivenLogits
from gold.losses import OBJECTIVES, LossInputs, Objective
from gold.models.hidden_states import head_logits
from gold.models.pretrained import pick_device
from gold.tokenize.vocabulary import Vocabulary

WIDTHS = {"smollm2-135m-instruct": 49_152, "llama3_1": 128_256, "qwen3": 151_936, "gemma3": 262_144}
"""Rows of the output matrices of the models that the tokenizers belong to."""
PAIRS = (
    ("smollm2-135m-instruct", "gemma3"),
    ("llama3_1", "qwen3"),
    ("qwen3", "gemma3"),
    ("qwen3", "qwen3"),
)
FEW = 24
"""Tokens of the case that only compiles what is compiled at the first call."""


@dataclass(frozen=True)
class Case:
    """Tokenizers of student and teacher, rows of the student, and the width of the states of both."""

    student: str
    teacher: str
    tokens: int
    hidden: int


@dataclass(frozen=True)
class Row:
    """What was found for one loss in one case; without ``seconds``, ``note`` says why.

    ``times_gold`` is how many times the seconds of the loss that it is compared with, in the same round, it took.
    """

    name: str
    calls: int = 0
    seconds: Spread | None = None
    fastest_s: float | None = None
    times_gold: Spread | None = None
    gflop_per_s: float | None = None
    share: float | None = None
    peak_mib: float | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What was found for one case. ``logits_mib`` is what both sides' logits would take in float32."""

    student: str
    teacher: str
    rows_S: int
    rows_T: int
    hidden: int
    dtype: str
    logits_mib: float
    square_gflop_per_s: float
    rows: list[Row]


@dataclass
class Inputs:
    """States and matrices of both sides, the student's with gradients, and the text that they are of."""

    pair: VocabularyPair
    text: AlignedText
    hidden_S: Tensor
    matrix_S: Tensor
    hidden_T: Tensor
    matrix_T: Tensor
    exact: bool = False
    logits_S: Tensor | None = None
    logits_T: Tensor | None = None

    @classmethod
    def of(cls, case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Matrices and a text; the states are drawn by ``draw``."""
        pair = vocabularies(case.student, case.teacher)
        text = text_of(pair, case.tokens)
        generator = torch.Generator(device).manual_seed(1)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def side(name: str, tokens: int) -> tuple[Tensor, Tensor]:
            matrix = tensor(WIDTHS[name], case.hidden).div_(math.sqrt(case.hidden))
            states = torch.zeros((tokens + 1, case.hidden), device=device, dtype=dtype)
            return states, nn.Parameter(matrix, requires_grad=False)

        mine = side(case.student, text.student.ids.size)
        for given in mine:
            given.requires_grad_(True)
        return cls(pair, text, *mine, *side(case.teacher, text.teacher.ids.size))

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """New states: logits of standard deviation 2, that of the row's own token higher by 0 to 24."""
        batch = self.batch()
        for side, (hidden, matrix, target) in enumerate(
            (
                (self.hidden_S, self.matrix_S, batch.student.targets),
                (self.hidden_T, self.matrix_T, batch.teacher.targets),
            )
        ):
            generator = torch.Generator(hidden.device).manual_seed(2 * seed + side)
            noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
            sure = 24.0 * torch.rand((len(target), 1), generator=generator, device=hidden.device)
            hidden.copy_(2.0 * noise + sure * matrix[target.clamp(min=0)])
        self.logits_S = self.logits_T = None

    @torch.no_grad()
    def make_logits(self) -> None:
        """The logits of the states as they are now."""
        self.logits_S = (self.hidden_S @ self.matrix_S.T).requires_grad_(True)
        self.logits_T = self.hidden_T @ self.matrix_T.T

    @property
    def logits_bytes(self) -> int:
        """What both sides' logits take in float32."""
        mine = self.hidden_S.shape[0] * self.matrix_S.shape[0]
        return 4 * (mine + self.hidden_T.shape[0] * self.matrix_T.shape[0])

    @property
    def asked_for(self) -> tuple[Tensor, ...]:
        """What the gradient is asked for: of logits where there are any."""
        return (self.hidden_S, self.matrix_S) if self.logits_S is None else (self.logits_S,)

    def batch(self) -> AlignedBatch:
        """The text with no index array made yet."""
        return AlignedBatch([self.text], self.pair, self.hidden_S.device, self.hidden_T.device)

    def loss_inputs(self) -> LossInputs:
        """What an objective sees."""
        if self.logits_S is not None and self.logits_T is not None:
            return LossInputs(self.batch(), GivenLogits(self.logits_S), GivenLogits(self.logits_T))
        mine, theirs = (
            head_logits(model, hidden)
            for hidden, model in (
                (self.hidden_S, _Embeddings(self.matrix_S)),
                (self.hidden_T, _Embeddings(self.matrix_T)),
            )
        )
        return LossInputs(self.batch(), mine, theirs)

    @cached_property
    def in_float64(self) -> Inputs:
        """The same numbers in float64, for the definitions in plain torch."""
        mine, matrix, theirs, matrix_T = (
            nn.Parameter(t.detach().double(), requires_grad=False)
            for t in (self.hidden_S, self.matrix_S, self.hidden_T, self.matrix_T)
        )
        for given in (mine, matrix):
            given.requires_grad_(True)
        return Inputs(self.pair, self.text, mine, matrix, theirs, matrix_T, exact=True)

    def with_logits(self) -> Inputs:
        """The same inputs, the logits of the states being given."""
        made = replace(self)
        made.make_logits()
        return made


@dataclass(frozen=True)
class Loss:
    """A loss by name: its value, to be differentiated, and how many rows of either side it cannot do without.

    ``exact`` gives the same value from inputs in float64. ``from_logits``: of given logits instead of states. ``base``
    is the loss that its seconds are compared with, the first of all where it is empty.
    """

    name: str
    value: Callable[[Inputs], Tensor]
    rows: Callable[[AlignedBatch], tuple[int, int]]
    exact: Callable[[Inputs], Tensor]
    note: str = ""
    from_logits: bool = False
    base: str = ""


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument(
        "--record", action="store_true", help="keep the result in benchmarks/results/loss-cpu.json, or -gpu"
    )
    parser.add_argument("--into", type=Path, default=RESULTS, help="another folder for the record")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    try:
        device = pick_device(given.device)
        cases = cases_of(given, device)
        for name in sorted({name for case in cases for name in (case.student, case.teacher)}):
            tokenizer_path(name)
    except GoldError as error:
        parser.exit(1, f"error: {error}\n")
    gpu = device.type == "cuda"
    torch.set_num_threads(given.threads)
    numba.set_num_threads(min(given.threads, numba.get_num_threads()))
    limits = Limits(
        given.limit,
        given.seconds or (1.0 if gpu else 15.0),
        given.rounds,
        given.exact if given.exact is not None else (1024 if gpu else 256),
        started + given.budget if given.budget else math.inf,
    )
    command = command_line("loss", arguments)
    print(f"{device_name(device.type, None if gpu else given.threads)}, {_peers()}", flush=True)
    found: list[Found] = []
    bench = Bench(device, limits)
    for case in cases:
        one = bench.measure(case)
        if one is not None:
            print(f"\n{table(one)}", flush=True)
            found.append(one)
        if given.record and found:
            data = {
                "peers": peers.installed(),
                "clock": bench.meter.clock,
                "limit_s": given.limit,
                "cases": [asdict(each) for each in found],
                "left_out": bench.left_out,
            }
            write_record(
                "loss-gpu" if gpu else "loss-cpu",
                data,
                command=command,
                seconds=time.perf_counter() - started,
                device=device_name(device.type, None if gpu else given.threads),
                folder=given.into,
            )
    for line in bench.left_out:
        print(f"left out, no time: {line}")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how long."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (%(default)s)")
    parser.add_argument("--pairs", type=int, nargs="+", metavar="N", help=f"of {_numbered(PAIRS)}")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="rows of the student")
    parser.add_argument("--hidden", type=int, nargs="+", metavar="D", help="widths of the states")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each loss at most (%(default)s)")
    parser.add_argument("--seconds", type=float, help="of each loss in each case at most (15; on a GPU 1)")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="longest call of a baseline in seconds (%(default)g)"
    )
    parser.add_argument("--exact", type=int, metavar="T", help="errors up to so many tokens (256; GPU 1024)")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")


def cases_of(given: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases that were asked for, else those that this device can do, what matters most first.

    Raises: GoldError for numbers that make no case.
    """
    if any(n not in range(len(PAIRS)) for n in given.pairs or ()):
        raise GoldError(f"--pairs: choose of {_numbered(PAIRS)}")
    if min([*(given.tokens or ()), *(given.hidden or ()), given.threads, given.rounds]) < 1:
        raise GoldError("--tokens, --hidden, --threads and --rounds: 1 or more")
    gpu = device.type == "cuda"
    wanted = given.pairs or range(len(PAIRS))
    if not given.tokens and not given.hidden:
        return [Case(*PAIRS[n], tokens, hidden) for n, hidden, tokens in sweep(gpu) if n in wanted]
    return [
        Case(*PAIRS[n], tokens, hidden)
        for n in wanted
        for hidden in given.hidden or (2048 if gpu else 576,)
        for tokens in given.tokens or (256,)
    ]


def sweep(gpu: bool) -> list[tuple[int, int, int]]:
    """Pair, width of the states, tokens."""
    if not gpu:
        return [
            *((0, 576, tokens) for tokens in (128, 256, 512, 1024)),
            *((pair, 576, 256) for pair in (3, 1, 2)),
            *((0, 576, tokens) for tokens in (2048, 4096)),
            (0, 2048, 128),
            *((pair, 576, 1024) for pair in (3, 1, 2)),
            (0, 576, 8192),
        ]
    return [
        *((pair, 2048, tokens) for tokens in (1024, 8192) for pair in range(4)),
        *((0, 2048, tokens) for tokens in (128, 256, 512, 2048, 4096)),
        *((pair, hidden, 8192) for hidden in (576, 1024, 4096) for pair in range(4)),
        *((pair, 2048, tokens) for pair in (1, 2) for tokens in (128, 256, 512, 2048, 4096)),
    ]


@dataclass(frozen=True)
class Limits:
    """How long a call of a baseline may take, how long all calls of a loss in a case, how many there are; up to how
    many tokens errors are looked for; when no case is begun any more."""

    call_s: float
    case_s: float
    rounds: int
    exact_tokens: int
    deadline: float


@dataclass
class Bench:
    """All cases of one process."""

    device: torch.device
    limits: Limits
    left_out: list[str] = field(default_factory=list)
    _before: dict[tuple[str, str, int, str], tuple[int, float, float]] = field(default_factory=dict)
    _compiled: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.meter = Meter(self.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def measure(self, case: Case) -> Found | None:
        """Every loss in one case; None where its time has come before it is begun."""
        if time.perf_counter() > self.limits.deadline:
            self.left_out.append(_told(case))
            return None
        self._compile(case)
        inputs = Inputs.of(case, self.device, self.dtype)
        inputs.draw(0)
        losses = list(losses_of(inputs.pair, self.device))
        notes = {loss.name: loss.note or self._refused(case, loss, inputs) for loss in losses}
        errors = {loss.name: self._errors(loss, inputs) for loss in losses if not notes[loss.name]}
        inputs.__dict__.pop("in_float64", None)
        called = [loss for loss in losses if not notes[loss.name]]
        of_logits = replace(inputs)
        works: dict[str, Callable[[], object]] = {
            loss.name: _gradients(loss.value, of_logits if loss.from_logits else inputs) for loss in called
        }
        square, square_flop = square_product(self.device, self.dtype)
        works |= {PRODUCTS: matrix_products(inputs), SQUARE: square}
        samples, failed = self._in_turn(
            works, inputs, of_logits if any(loss.from_logits for loss in called) else None
        )
        notes |= failed
        batch, first = inputs.batch(), losses[0].name
        rows_S, rows_T = inputs.hidden_S.shape[0], inputs.hidden_T.shape[0]
        everything = Loss(PRODUCTS, losses[0].value, all_rows, losses[0].value)
        rate = square_flop / spread([s.seconds for s in samples[SQUARE].values()]).median
        sizes = [t.numel() * t.element_size() for t in (inputs.hidden_S, inputs.matrix_S)]
        of_student = inputs.hidden_S.shape[0] * inputs.matrix_S.shape[0] * inputs.hidden_S.element_size()
        rows = []
        for loss in (*losses, everything):
            calls = samples.get(loss.name)
            if not calls:
                rows.append(Row(loss.name, note=notes[loss.name]))
                continue
            seconds = [s.seconds for n, s in calls.items() if n >= 0] or [s.seconds for s in calls.values()]
            peaks = [s.peak_bytes for s in calls.values() if s.peak_bytes is not None]
            self._before[case.student, case.teacher, case.hidden, loss.name] = (
                case.tokens,
                max(seconds),
                float(max(peaks, default=0)),
            )
            if loss.name in failed:
                rows.append(Row(loss.name, note=failed[loss.name]))
                continue
            gradients = of_student if loss.from_logits else sum(sizes)
            peak = max(0, max(peaks) - gradients) if peaks else None
            both = [
                s.seconds / base.seconds
                for n, s in calls.items()
                if (base := samples.get(loss.base or first, {}).get(n)) is not None
            ]
            done = operations(inputs, loss.rows(batch)) / spread(seconds).median
            value_error, gradient_error = errors.get(loss.name, (None, None))
            rows.append(
                Row(
                    loss.name,
                    len(seconds),
                    spread(seconds),
                    min(seconds),
                    spread(both) if both else None,
                    None if loss.from_logits else done / 1e9,
                    None if loss.from_logits else done / rate,
                    None if peak is None else round(peak / MIB, 1),
                    value_error,
                    gradient_error,
                )
            )
        return Found(
            case.student,
            case.teacher,
            rows_S,
            rows_T,
            case.hidden,
            str(self.dtype).removeprefix("torch."),
            (rows_S * inputs.matrix_S.shape[0] + rows_T * inputs.matrix_T.shape[0]) * 4 / MIB,
            rate / 1e9,
            rows,
        )

    def _compile(self, case: Case) -> None:
        if (case.student, case.teacher) in self._compiled:
            return
        few = Inputs.of(Case(case.student, case.teacher, FEW, 64), self.device, self.dtype)
        few.draw(0)
        for loss in losses_of(few.pair, self.device):
            if not loss.note:
                _gradients(loss.value, few.with_logits() if loss.from_logits else few)()
        self._compiled.add((case.student, case.teacher))

    def _refused(self, case: Case, loss: Loss, inputs: Inputs) -> str:
        """Why a loss is not called in this case, from what it took with fewer tokens; empty if it is."""
        if loss.from_logits and inputs.logits_bytes > MOST_LOGITS:
            return f"not called: logits of {inputs.logits_bytes / 2**30:.1f} GiB"
        free = self.meter.free_bytes()
        if not _ours(loss.name) and free is not None and loss.name not in CHUNKED:
            # Logits, their gradients, and as much again for what is made of them.
            least = 4 * 4 * inputs.hidden_S.shape[0] * (inputs.matrix_S.shape[0] + inputs.matrix_T.shape[0])
            if least > free:
                return f"does not fit: at least {least / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        known = self._before.get((case.student, case.teacher, case.hidden, loss.name))
        if known is None or case.tokens <= known[0]:
            return ""
        tokens, seconds, peak = known
        more = case.tokens / tokens
        if seconds * more > self.limits.call_s and not _ours(loss.name):
            return f"not called: {seconds:.0f} s at {tokens:,} tokens"
        if loss.name not in CHUNKED and free is not None and peak * more > free:
            return f"does not fit: {peak / 2**30:.0f} GiB at {tokens:,} tokens, {free / 2**30:.0f} are free"
        return ""

    def _errors(self, loss: Loss, inputs: Inputs) -> tuple[float | None, float | None]:
        """Relative errors of value and gradients; None where they are not looked for."""
        if inputs.hidden_S.shape[0] > self.limits.exact_tokens:
            return None, None
        given, exactly = inputs, inputs.in_float64
        if loss.from_logits:
            # The logits of the states, rounded as they are, are the same on both sides.
            given = inputs.with_logits()
            exactly = replace(
                inputs.in_float64, logits_S=_leaf(given.logits_S), logits_T=_leaf(given.logits_T)
            )
        try:
            exact = _value_and_gradients(loss.exact, exactly)
            found = _value_and_gradients(loss.value, given)
        except torch.OutOfMemoryError:
            return None, None
        apart = [
            float((a.double() - b).norm() / b.norm()) if b.norm() else float(a.double().norm())
            for a, b in zip(found, exact, strict=True)
        ]
        return apart[0], max(apart[1:])

    def _in_turn(
        self, works: Mapping[str, Callable[[], object]], inputs: Inputs, of_logits: Inputs | None
    ) -> tuple[dict[str, dict[int, Sample]], dict[str, str]]:
        """Samples of each work by round, and why some do not count; round −1 counts only where no other does."""
        samples: dict[str, dict[int, Sample]] = {name: {} for name in works}
        failed: dict[str, str] = {}
        for round_ in range(-1, self.limits.rounds):
            if round_ > 0 and time.perf_counter() > self.limits.deadline:
                break
            inputs.draw(round_ + 2)
            if of_logits is not None:
                of_logits.make_logits()
            gc.collect()
            first = max(round_, 0) % len(works)
            for name in [*works][first:] + [*works][:first]:
                spent = sum(s.seconds for s in samples[name].values())
                if name in failed or (samples[name] and spent > self.limits.case_s):
                    continue
                try:
                    sample = self.meter(works[name])
                except torch.OutOfMemoryError:
                    failed[name], samples[name] = "does not fit", {}
                    torch.cuda.empty_cache()
                    continue
                for given in (inputs, of_logits or inputs):
                    for tensor in given.asked_for:
                        tensor.grad = None
                samples[name][round_] = sample
                if sample.seconds > self.limits.call_s and not _ours(name):
                    failed[name] = f"over {self.limits.call_s:g} s"
        return samples, failed


# Losses


def losses_of(pair: VocabularyPair, device: torch.device) -> Iterator[Loss]:
    """Ours first, then what stores all logits, then those of peers."""
    if pair.same:
        ours = OBJECTIVES["gkd"]()
        yield Loss("gold: JSD", _objective(ours), all_rows, _objective(ours))
        yield Loss("naive torch: JSD", naive_jsd, all_rows, naive_jsd)
        for name, function in peers.losses_from_states(device):
            if isinstance(function, str):
                yield Loss(name, naive_jsd, all_rows, naive_jsd, note=function)
                continue
            yield Loss(name, _from_states(function), all_rows, naive_jsd)
        return
    reverse, forward = OBJECTIVES["reverse_kl"], OBJECTIVES["forward_kl"]
    for name, objective, rows in (
        ("gold: reverse KL on bytes", reverse(support="bytes"), all_rows),
        ("gold: forward KL on prefixes", forward(support="prefix"), all_rows),
        ("gold: reverse KL on shared tokens", reverse(support="shared"), synced_rows),
        ("gold: sorted distances (ULD)", OBJECTIVES["uld"](), paired_rows),
        ("gold: the hybrid of GOLD", OBJECTIVES["gold"](), all_rows),
        ("gold: span policy gradient", OBJECTIVES["span_pg"](), all_rows),
    ):
        yield Loss(name, _objective(objective), rows, _objective(objective))
    hybrid = f"gold: the hybrid of GOLD{FROM_LOGITS}"
    for name, objective in (
        (hybrid, OBJECTIVES["gold"]()),
        (f"gold: reverse KL on bytes{FROM_LOGITS}", reverse(support="bytes")),
    ):
        value = _objective(objective)
        yield Loss(name, value, all_rows, value, from_logits=True, base=hybrid)
    shared = _objective(reverse(support="shared"))
    yield Loss("naive torch: reverse KL on shared tokens", naive_shared, synced_rows, shared)
    published = _trl()
    if published is None:
        for name in (TRL_GOLD, TRL_GOLD + FROM_LOGITS):
            yield Loss(name, naive_shared, all_rows, naive_shared, note="TRL is not installed")
    else:
        value = _objective(published)
        yield Loss(TRL_GOLD, value, all_rows, value)
        yield Loss(TRL_GOLD + FROM_LOGITS, value, all_rows, value, from_logits=True, base=hybrid)


SMOOTHING = 1e-5
PRODUCTS, SQUARE, TRL_GOLD = "matrix products", "square product", "TRL GOLD, default merge"
FROM_LOGITS = ", from logits"
MOST_LOGITS = 2 * 2**30
"""Of more bytes of logits, none are given."""
CHUNKED = ("TRL chunked JSD", "Liger chunked JSD")


def _ours(name: str) -> bool:
    """Whether this is no baseline, to be measured however long it takes."""
    return name.startswith("gold") or name in (PRODUCTS, SQUARE)


@cache
def _trl() -> Objective | None:
    return dict(peers.losses()).get(TRL_GOLD)


def naive_shared(inputs: Inputs) -> Tensor:
    """Reverse KL on byte-equal tokens, the stop event and a bucket, from logits of all rows at once."""
    batch = inputs.batch()
    rows_S, rows_T = batch.synced_states
    logp = torch.log_softmax((inputs.hidden_S @ inputs.matrix_S.T).to(_wide(inputs)), dim=-1)[rows_S]
    with torch.no_grad():
        logq = torch.log_softmax((inputs.hidden_T @ inputs.matrix_T.T).to(_wide(inputs)), dim=-1)[rows_T]
    events, sides = batch.shared_events, []
    for x, ids, stops in ((logp, events.ids_V, events.stops_V), (logq, events.ids_W, events.stops_W)):
        left = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        left[ids] = left[stops] = False
        joined = [torch.logsumexp(x[:, columns], dim=-1, keepdim=True) for columns in (stops, left)]
        sides.append(torch.cat((x[:, ids], *joined), dim=-1).exp())
    # As the objective has it: a share of every event counts as the bucket, on both sides.
    p, q = (
        torch.cat((x[:, :-1] * (1 - SMOOTHING), x[:, -1:] * (1 - SMOOTHING) + SMOOTHING), dim=-1).log()
        for x in sides
    )
    return (p.exp() * (p - q)).sum()


def naive_jsd(inputs: Inputs) -> Tensor:
    """JSD with β = ½ over one vocabulary, from logits of all rows at once."""
    logp = torch.log_softmax((inputs.hidden_S @ inputs.matrix_S.T).to(_wide(inputs)), dim=-1)
    with torch.no_grad():
        logq = torch.log_softmax((inputs.hidden_T @ inputs.matrix_T.T).to(_wide(inputs)), dim=-1)
    logm = torch.logaddexp(logp, logq) - math.log(2)
    return 0.5 * ((logp.exp() * (logp - logm)).sum() + (logq.exp() * (logq - logm)).sum())


def _objective(objective: Objective) -> Callable[[Inputs], Tensor]:
    def value(inputs: Inputs) -> Tensor:
        with use_backend("reference" if inputs.exact else None):
            return objective(inputs.loss_inputs()).total

    return value


def _from_states(function: peers.FromStates) -> Callable[[Inputs], Tensor]:
    return lambda inputs: function(inputs.hidden_S, inputs.matrix_S, inputs.hidden_T, inputs.matrix_T)


def _wide(inputs: Inputs) -> torch.dtype:
    return torch.float64 if inputs.exact else torch.float32


def all_rows(batch: AlignedBatch) -> tuple[int, int]:
    """Every row of both sides."""
    return int(batch.student.row_starts[-1]), int(batch.teacher.row_starts[-1])


def synced_rows(batch: AlignedBatch) -> tuple[int, int]:
    """Rows of both sides that have read the same bytes."""
    rows_S, rows_T = batch.synced_states
    return rows_S.numel(), rows_T.numel()


def paired_rows(batch: AlignedBatch) -> tuple[int, int]:
    """Rows of both sides of the same number."""
    return (min(all_rows(batch)),) * 2


# Work


def _gradients(value: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], object]:
    return lambda: value(inputs).backward()


def _value_and_gradients(value: Callable[[Inputs], Tensor], inputs: Inputs) -> list[Tensor]:
    total = value(inputs)
    gradients = torch.autograd.grad(total, inputs.asked_for)
    return [total.detach(), *gradients]


def _leaf(logits: Tensor | None) -> Tensor | None:
    """The same numbers in float64, for gradients."""
    return None if logits is None else logits.detach().double().requires_grad_(True)


def operations(inputs: Inputs, rows: tuple[int, int]) -> float:
    """Floating-point operations of the matrix products for so many rows of either side."""
    mine = rows[0] * inputs.matrix_S.numel()
    return 2.0 * (mine + rows[1] * inputs.matrix_T.numel()) + 4.0 * mine


def matrix_products(inputs: Inputs) -> Callable[[], object]:
    """Logits of both sides, and gradients from them as if they were the logits', a block of rows at a time."""
    block = 2048 if inputs.hidden_S.device.type == "cuda" else 128
    wider = max(inputs.matrix_S.shape[0], inputs.matrix_T.shape[0])
    logits = torch.empty(block * wider, device=inputs.hidden_S.device, dtype=inputs.hidden_S.dtype)

    @torch.no_grad()
    def work() -> None:
        gradient = torch.zeros_like(inputs.matrix_S)
        kept = torch.empty_like(inputs.hidden_S)
        for hidden, matrix in ((inputs.hidden_S, inputs.matrix_S), (inputs.hidden_T, inputs.matrix_T)):
            for first in range(0, hidden.shape[0], block):
                rows = hidden[first : first + block]
                out = logits[: rows.shape[0] * matrix.shape[0]].view(rows.shape[0], matrix.shape[0])
                torch.mm(rows, matrix.T, out=out)
                if matrix is inputs.matrix_S:
                    torch.mm(out, matrix, out=kept[first : first + block])
                    gradient.addmm_(out.T, rows)

    return work


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A product of two square matrices, and its floating-point operations."""
    size = 8192 if device.type == "cuda" else 1024
    one, other, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(one, other, out=out), 2.0 * size**3


class _Embeddings(nn.Module):
    """A model that has an output matrix, and nothing else that is asked for."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.output = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        del self.output.weight
        self.output.weight = matrix  # itself, no copy of it: it gets the gradient
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.output


@cache
def vocabularies(student: str, teacher: str) -> VocabularyPair:
    """The two real vocabularies, or one of them as both."""
    mine = _vocabulary(student)
    return VocabularyPair(mine, mine if student == teacher else _vocabulary(teacher))


@cache
def _vocabulary(name: str) -> Vocabulary:
    return Vocabulary.load(tokenizer_path(name))


def text_of(pair: VocabularyPair, tokens: int) -> AlignedText:
    """A completion of so many student tokens, the stop event being the last one, as both sides read it."""
    size_bytes = 8 * tokens
    ids = pair.student.encode("".join(plain_texts(1, size_bytes))).ids
    while ids.size < tokens:
        size_bytes *= 2
        ids = pair.student.encode("".join(plain_texts(1, size_bytes))).ids
    stop = np.array(pair.student.stop_ids[:1], np.int32)
    tokenized = pair.student.decode(ids[: tokens - 1])
    return AlignedText(
        np.concatenate((tokenized.ids, stop)), tokenized, pair.to_teacher(tokenized), stopped=True
    )


# Tables


def table(found: Found) -> str:
    """The case as a table for people."""
    lines = [
        f"{found.student} ({WIDTHS[found.student]:,}) ← {found.teacher} ({WIDTHS[found.teacher]:,}), "
        f"{found.rows_S:,} and {found.rows_T:,} rows of {found.hidden:,}, {found.dtype}; "
        f"square product {found.square_gflop_per_s:,.0f} GFLOP/s, logits {found.logits_mib:,.0f} MiB",
        "",
        "| loss | seconds (quartiles) | × gold | GFLOP/s | share | peak MiB | of logits "
        "| error: value | gradients |",
        "|---" * 9 + "|",
    ]
    for row in found.rows:
        if row.seconds is None:
            lines.append(f"| {row.name} | {row.note} |" + "  |" * 7)
            continue
        time_ = f"{row.seconds.median:.3g} ({row.seconds.low:.3g}–{row.seconds.high:.3g})"
        ratio = f"{row.times_gold.median:.2f}" if row.times_gold else "–"
        of_logits = "–" if row.peak_mib is None else f"{row.peak_mib / found.logits_mib:.0%}"
        peak = "–" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
        errors = ["–" if e is None else f"{e:.1e}" for e in (row.value_error, row.gradient_error)]
        rate = "–" if row.gflop_per_s is None else f"{row.gflop_per_s:,.0f}"
        share = "–" if row.share is None else f"{row.share:.0%}"
        cells = [row.name, time_, ratio, rate, share, peak, of_logits]
        lines.append(f"| {' | '.join([*cells, *errors])} |")
    return "\n".join(lines)


def _peers() -> str:
    return (
        ", ".join(f"{name} {version}" for name, version in peers.installed().items()) or "no peer installed"
    )


def _numbered(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{n}: {student} ← {teacher}" for n, (student, teacher) in enumerate(pairs))


def _told(case: Case) -> str:
    return f"{case.student} ← {case.teacher}, {case.tokens:,} tokens, hidden {case.hidden:,}"
