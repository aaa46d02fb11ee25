"""The table of `gold doctor --memory`: memory by part, changes that make it fit, time by phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gold.doctor.finding import Finding
from gold.doctor.fit import Change, changes_to_fit
from gold.doctor.memory import KINDS, PHASES, Memory, Plan, memory_of
from gold.doctor.step_time import Work, work_of

if TYPE_CHECKING:
    from gold.models.language_model import LanguageModel

_GIB = 2**30
_SHOWN = 0.02
"""Smallest share of a peak that the check names."""


@dataclass(frozen=True)
class Hardware:
    """What a run would have: bytes of each GPU, their number, and the rates that each reaches, if known: TFLOP/s, and
    GB/s of its memory. ``measured``: whether the rates were measured here; ``on_gpu``: false for main memory."""

    memory: int
    gpus: int = 1
    tflops: float | None = None
    bandwidth: float | None = None
    measured: bool = False
    on_gpu: bool = True


@dataclass(frozen=True)
class MemoryReport:
    """A run's memory and time on given hardware."""

    plan: Plan
    hardware: Hardware
    memory: Memory
    changes: Sequence[Change]
    work: Sequence[Work]

    @property
    def fits(self) -> bool:
        """Whether each GPU has enough."""
        return self.memory.peak <= self.hardware.memory

    def finding(self) -> Finding:
        """The check of the report."""
        memory, limit, hardware = self.memory, self.hardware.memory, self.hardware
        where = f"on each of {hardware.gpus} GPUs" if hardware.gpus > 1 else "of the GPU"
        where = where if hardware.on_gpu else "of main memory"
        sizes = {
            kind: sum(getattr(p, memory.phase) for p in memory.parts if p.kind == kind) for kind in KINDS
        }
        parts = ", ".join(
            f"{kind} {_gib(size)}" for kind, size in sizes.items() if size >= _SHOWN * memory.peak
        )
        found = f"{_gib(memory.peak)} of {_gib(limit)} {where}, in the phase {memory.phase}: {parts}"
        if self.fits:
            return Finding("memory", "pass", found)
        settings = ", ".join(change.settings for change in self.changes)
        if not self.changes or self.changes[-1].memory.peak > limit:
            return Finding(
                "memory", "warn", found, f"no settings make it fit{settings and ', also not ' + settings}"
            )
        return Finding("memory", "warn", found, f"set {settings} (gold doctor --memory shows each)")


def examine_memory(plan: Plan, hardware: Hardware) -> MemoryReport:
    """The report of a plan.

    Raises:
        ModelError: the parameters of a model cannot be counted.
    """
    return MemoryReport(plan, hardware, memory_of(plan), changes_to_fit(plan, hardware.memory), work_of(plan))


def measured(hardware: Hardware, student: LanguageModel, sequences: int, tokens: int) -> Hardware:
    """The hardware with the rates that the student reaches on this machine, unless they are stated: of a forward pass,
    and of one over a single token, which waits for the weights."""
    from gold.doctor.weights import forward_seconds

    if hardware.tflops or hardware.bandwidth:
        return hardware
    count = sum(p.numel() for p in student.lm.parameters())
    held = sum(p.nbytes for p in student.lm.parameters())
    tflops = (
        2
        * count
        * sequences
        * min(tokens, student.context)
        / forward_seconds(student, sequences, tokens)
        / 1e12
    )
    return replace(
        hardware, tflops=tflops, bandwidth=held / forward_seconds(student, 1, 1) / 1e9, measured=True
    )


def memory_lines(report: MemoryReport) -> Iterator[str]:
    """The report as lines of text."""
    plan, hardware, memory = report.plan, report.hardware, report.memory
    gpus = "1 GPU" if hardware.gpus == 1 else f"each of {hardware.gpus} GPUs"
    yield (
        f"Memory of {gpus}, GiB: microbatches of {plan.sequences} × {plan.tokens} tokens, "
        f"{plan.own_sequences} sequences a step"
    )
    yield ""
    width = max(len(part.name) for part in memory.parts)
    yield " ".join((f"{'':<{width}}", *(f"{phase:>9}" for phase in PHASES)))
    for part in memory.parts:
        yield " ".join((f"{part.name:<{width}}", *(_cell(getattr(part, phase)) for phase in PHASES)))
    yield " ".join((f"{'total':<{width}}", *(_cell(memory.total(phase)) for phase in PHASES)))
    yield ""
    verdict = "it fits" if report.fits else "it does not fit"
    yield f"{_gib(memory.peak)} of {_gib(hardware.memory)}: {verdict}"
    if plan.read_first:
        yield f"{_gib(plan.read_first)} of main memory for the first process, which reads the models for all"
    if report.changes:
        yield ""
        yield "Changes in the order in which to make them, and the memory that is then needed"
        wide = max(len(change.settings) for change in report.changes)
        for change in report.changes:
            fits = " fits" if change.memory.peak <= hardware.memory else ""
            yield f"  {change.settings:<{wide}}  {_gib(change.memory.peak):>10}{fits:<5}  {change.cost}"
    yield ""
    yield from _time_lines(report)


def _time_lines(report: MemoryReport) -> Iterator[str]:
    hardware = report.hardware
    rates = []
    if hardware.tflops:
        rates.append(f"{hardware.tflops:.3g} TFLOP/s")
    if hardware.bandwidth:
        rates.append(f"{hardware.bandwidth:.3g} GB/s")
    given = "measured here" if hardware.measured else "stated"
    origin = (
        f"at {' and '.join(rates)} ({given})" if rates else "--tflops and --bandwidth of a GPU give seconds"
    )
    yield f"Work of a step on {'the GPU' if hardware.gpus == 1 else 'each GPU'}, {origin}"
    total: float | None = 0.0
    for work in report.work:
        seconds = work.seconds(hardware.tflops, hardware.bandwidth)
        total = None if total is None or seconds is None else total + seconds
        amount = f"{work.flops / 1e12:>10,.1f} TFLOP" if work.flops else " " * 16
        amount += f" {work.bytes / 1e9:>10,.1f} GB" if work.bytes else " " * 14
        yield f"  {work.phase:<8} {amount}" + (f" {seconds:>9.1f} s" if seconds is not None else "")
    if total is not None:
        yield f"  {'step':<8} {'':>30} {total:>9.1f} s"


def memory_json(report: MemoryReport) -> dict[str, Any]:
    """The report as JSON: bytes and seconds."""
    hardware = report.hardware
    return {
        "gpus": hardware.gpus,
        "available": hardware.memory,
        "peak": report.memory.peak,
        "phase": report.memory.phase,
        "main_memory_of_first": report.plan.read_first,
        "fits": report.fits,
        "parts": [asdict(part) for part in report.memory.parts],
        "changes": [{"settings": c.settings, "cost": c.cost, "peak": c.memory.peak} for c in report.changes],
        "work": [
            {**asdict(work), "seconds": work.seconds(hardware.tflops, hardware.bandwidth)}
            for work in report.work
        ],
    }


def _cell(size: int) -> str:
    return f"{size / _GIB:>9.1f}" if size else f"{'–':>9}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
