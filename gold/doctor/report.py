"""The body of `gold doctor`: a pair examined, and the report for people and programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gold import terminal
from gold.doctor.checks import RUN_TEXTS, Check, Report, examine
from gold.doctor.sample import JUDGED, SAMPLE
from gold.doctor.side import read_side
from gold.doctor.sizes import StepMemory, machine_memory, step_memory
from gold.errors import ModelError, VocabularyError
from gold.models.files import check_kind
from gold.tokenize.load import open_source
from gold.tokenize.roles import Roles

if TYPE_CHECKING:
    from gold.models.causal import LanguageModel
    from gold.tokenize.templates import Rendering

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_VERDICTS = {
    "pass": "this pair can be trained",
    "warn": "this pair can be trained; read the warnings",
    "fail": "this pair cannot be trained",
}


def diagnose(
    student: str | Path,
    teacher: str | Path,
    *,
    texts: Sequence[str] = (),
    prompt: str = "",
    sequences: int = 8,
    tokens: int = 256,
    roles: tuple[Roles | None, Roles | None] = (None, None),
    renderings: tuple[Rendering | None, Rendering | None] = (None, None),
    dtypes: tuple[str, str] = ("float32", "auto"),
    load: Callable[[], tuple[LanguageModel, LanguageModel | None]] | None = None,
    served: bool = False,
) -> Report:
    """All checks of a pair of folders, tokenizer files or Hub ids; of their weights too with `load`, which gives both,
    or the student alone where the teacher is `served`.

    `texts` are a run's own, `roles` the special tokens that it names, `renderings` what it gives to their chat
    templates, `dtypes` those of the weights. A forward pass reads `sequences`, each of `tokens` student tokens behind
    those of `prompt`.

    Raises:
        VocabularyError: a source that is no tokenizer at all; one that cannot be spelled is a failed check.
        ModelError: weights that cannot be loaded.
    """
    sides, refused = [], []
    both = zip(("student", "teacher"), (student, teacher), roles, renderings, strict=True)
    for role, source, named, rendering in both:
        try:
            if role == "student" or not served:
                check_kind(source)
        except ModelError as error:
            refused.append(Check("model", "fail", f"{role}: {error}"))
        try:
            sides.append(read_side(role, source, named, rendering))
        except VocabularyError as error:
            open_source(source, roles=named)  # what cannot be read is the user's error, no finding
            refused.append(Check("spelling", "fail", f"{role}: {error}", _instead(error)))
    if refused:
        return Report(refused)
    mine, theirs = sides
    report = examine(mine, theirs, texts)
    checks, unchecked = list(report.checks), list(report.unchecked)
    tokens += len(mine.vocabulary.encode(prompt))
    needed = step_memory(mine, theirs, sequences, tokens, dtypes, served)
    if needed is None:
        silent = " and ".join(side.role for side in sides[: 2 - served] if not side.config)
        unchecked.append(
            f"memory: no config.json of {silent}" if silent else "memory: an unusual config.json"
        )
    else:
        checks.append(memory_check(needed))
    if load is None:
        loaded = "the student" if served else "both models"
        unchecked.append(f"zero KL, bits per byte, time: --weights loads {loaded}")
    else:
        from gold.doctor.weights import examine_weights

        checks += examine_weights(*load(), texts or SAMPLE[JUDGED], sequences, tokens)
    return Report(checks, report.coverage, unchecked, needed, tuple(sides))


def _instead(error: VocabularyError) -> str:
    """What to do about a tokenizer that cannot be spelled, where the error does not say it itself."""
    return "take a model of another family" if "cannot be spelled in bytes" in str(error) else ""


def load_pair(student: str, teacher: str) -> tuple[LanguageModel, LanguageModel]:
    """Both models as a run loads them: the student in float32, the teacher as it was saved.

    Raises:
        ModelError: as for ``load_model``.
    """
    from gold.models.causal import load_model

    return load_model(student), load_model(teacher, dtype="auto")


def print_report(report: Report, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Writes a report: a table on a terminal, plain lines elsewhere, or one JSON object."""
    out = stream or sys.stdout
    if as_json:
        content = {
            "verdict": report.verdict,
            "checks": [asdict(check) for check in report.checks],
            "coverage": {name: asdict(found) for name, found in report.coverage.items()},
            "unchecked": report.unchecked,
        }
        terminal.show_json(content, out)
    elif out.isatty():
        _print_table(report, out)
    else:
        for check in report.checks:
            terminal.show(f"{check.status}  {check.check}: {check.found}", stream=out)
            if check.advice:
                terminal.show(f"      -> {check.advice}", stream=out)
        for line in report.unchecked:
            terminal.show(f"not checked: {line}", stream=out)
        terminal.show(verdict_line(report), stream=out)


def verdict_line(report: Report) -> str:
    """Whether the pair can be trained, and if not, why, in one line."""
    failed = [f"{check.check}: {check.found}" for check in report.failures]
    return f"{report.verdict}: {_VERDICTS[report.verdict]}" + (f": {'; '.join(failed)}" if failed else "")


def _print_table(report: Report, out: TextIO) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal.new_console(out)
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in (None, "bold", None):
        table.add_column(style=style or "", no_wrap=style is not None)
    for check in report.checks:
        found = Text(terminal.line(check.found))
        if check.advice:
            found.append(f"\n→ {terminal.line(check.advice)}", "italic")
        table.add_row(Text(check.status, _STYLES[check.status]), check.check, found)
    console.print(table)
    if report.coverage:
        console.print()
        console.print(_coverage_table(report))
    console.print()
    for line in report.unchecked:
        console.print(terminal.line(f"not checked: {line}"), style="dim")
    console.print(terminal.line(verdict_line(report)), style=_STYLES[report.verdict])


def _coverage_table(report: Report) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tokens of", no_wrap=True)
    for header in ("bytes", "student", "teacher", "1:1 tokens", "1:1 bytes", "largest", "repaired"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, found in report.coverage.items():
        repaired = found.student_repaired_bytes, found.teacher_repaired_bytes
        table.add_row(
            "this run" if name == RUN_TEXTS else name,
            f"{found.bytes:,}",
            f"{found.student_tokens:,}",
            f"{found.teacher_tokens:,}",
            f"{found.one_to_one_tokens:.0%}",
            f"{found.one_to_one_bytes:.0%}",
            f"{found.largest_chunk_bytes:,} B",
            " + ".join(f"{size:,} B" for size in repaired) if any(repaired) else "0 B",
        )
    return table


def memory_check(needed: StepMemory) -> Check:
    """Whether a step fits into this machine's memory."""
    teachers = "teacher" if needed.teachers == 1 else f"{needed.teachers} teachers"
    theirs = (
        f"{_gib(needed.teacher)} ({needed.teacher_parameters / 1e6:,.0f} M)"
        if needed.teacher
        else "served elsewhere"
    )
    found = (
        f"{_gib(needed.total)} for {needed.sequences} × {needed.tokens} tokens: student {_gib(needed.student)} "
        f"({needed.student_parameters / 1e6:,.0f} M × "
        f"{needed.student // needed.student_parameters} bytes: weights, gradients, AdamW), activations "
        f"{_gib(needed.activations)}, logits {_gib(needed.logits)}, {teachers} {theirs}"
    )
    here = machine_memory()
    if here is not None and needed.total > here:
        return Check(
            "memory",
            "warn",
            found,
            f"this machine has {_gib(here)} of main memory; a GPU with as much would do, or fewer --sequences "
            "(train.micro_batch_size), or train.gradient_checkpointing",
        )
    return Check("memory", "pass", found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
