"""The implementation of `gold doctor`: all checks of a pair, as a table, as lines or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gold import terminal
from gold.doctor.checks import examine_pair
from gold.doctor.finding import Finding, Report
from gold.doctor.sample import JUDGED, RUN_TEXTS, SAMPLE
from gold.doctor.side import Side, read_side
from gold.doctor.sizes import StepMemory, machine_memory, step_memory
from gold.errors import ModelError, VocabularyError
from gold.models.files import check_kind
from gold.tokenize.load import open_source
from gold.tokenize.roles import Roles

if TYPE_CHECKING:
    from gold.models.language_model import LanguageModel
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
    load: Callable[[], tuple[LanguageModel, LanguageModel | None]] | None = None,
    served: bool = False,
    memory: bool = True,
) -> Report:
    """The report on two folders, tokenizer files or Hub ids.

    With `load`, which returns both models (the student alone if the teacher is `served`), their weights are checked
    too. `texts` are a run's own, `roles` the special tokens that it names, `renderings` its arguments of the chat
    templates. A forward pass reads `sequences`, each of `prompt` and `tokens` student tokens; `memory`: whether that
    of a step on this machine is estimated, the student in float32.

    Raises:
        VocabularyError: a source is no tokenizer at all; one whose tokens are not bytes is a failed check.
        ModelError: weights that cannot be loaded.
    """
    sides, refused = [], []
    for role, source, named, rendering in zip(
        ("student", "teacher"), (student, teacher), roles, renderings, strict=True
    ):
        try:
            if role == "student" or not served:
                check_kind(source)
        except ModelError as error:
            refused.append(Finding("model", "fail", f"{role}: {error}"))
        try:
            sides.append(read_side(role, source, named, rendering))
        except VocabularyError as error:
            open_source(source, roles=named)  # an unreadable file is an error, not a finding
            refused.append(Finding("tokenizers", "fail", f"{role}: {error}", _remedy(error)))
    if refused:
        return Report(refused)
    mine, theirs = sides
    report = examine_pair(mine, theirs, texts)
    checks, unchecked = [*report.checks], [*report.unchecked]
    tokens += len(mine.vocabulary.encode(prompt))
    checks += [_adapter_finding(side) for side in sides if side.adapter is not None]
    if memory:
        needed = step_memory(mine, theirs, sequences, tokens, _lora_of(mine))
        checks += [memory_finding(needed)] if needed is not None else []
        unchecked += [_why_no_memory(sides)] if needed is None else []
    if load is None:
        loaded = "the student" if served else "both models"
        unchecked.append(f"self KL, bits per byte, time: --weights loads {loaded}")
    else:
        from gold.doctor.weights import examine_weights

        checks += examine_weights(*load(), texts or SAMPLE[JUDGED], sequences, tokens)
    return Report(checks, report.coverage, unchecked, tuple(sides))


def _why_no_memory(sides: Sequence[Side]) -> str:
    silent = " and ".join(side.role for side in sides if not side.config)
    return f"memory: no config.json of {silent}" if silent else "memory: an unusual config.json"


def _lora_of(side: Side) -> Mapping[str, Any] | None:
    """Rank, targets and modules_to_save of the adapters of a folder; None without any, or for other kinds."""
    saved = side.adapter or {}
    rank, targets = saved.get("r"), saved.get("target_modules")
    if type(rank) is not int or not isinstance(targets, list):
        return None
    return {"rank": rank, "targets": targets, "modules_to_save": saved.get("modules_to_save")}


def _adapter_finding(side: Side) -> Finding:
    """The base model of a folder of adapters."""
    saved = side.adapter or {}
    rank = f" of rank {saved['r']}" if "r" in saved else ""
    base = saved.get("base_model_name_or_path")
    return Finding(
        "adapter", "pass", f"the {side.role} is an adapter ({saved.get('peft_type')}{rank}) of {base}"
    )


def _remedy(error: VocabularyError) -> str:
    """Advice for a tokenizer whose tokens are not bytes, unless the error already gives it."""
    return "use a model of another family" if "cannot be spelled in bytes" in str(error) else ""


def load_pair(student: str, teacher: str) -> tuple[LanguageModel, LanguageModel]:
    """Both models as a run loads them: the student in float32, the teacher as it was saved.

    Raises:
        ModelError: as for ``load_model``.
    """
    from gold.models.load import load_model

    return load_model(student), load_model(teacher, dtype="auto")


def combined(reports: Mapping[str, Report]) -> Report:
    """One report on a student and several teachers: findings under each teacher's name."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    each = reports.items()
    checks = [replace(f, check=f"{n}: {f.check}") for n, r in each for f in r.checks]
    coverage = {f"{name}: {kind}": found for name, r in each for kind, found in r.coverage.items()}
    return Report(checks, coverage, [f"{name}: {line}" for name, r in each for line in r.unchecked])


def print_report(report: Report, *, as_json: bool = False, stream: TextIO | None = None) -> None:
    """Prints a report: a table on a terminal, plain lines elsewhere, or one JSON object."""
    out = stream or sys.stdout
    if as_json:
        content = {
            "verdict": report.verdict,
            "checks": [asdict(finding) for finding in report.checks],
            "coverage": {name: asdict(found) for name, found in report.coverage.items()},
            "unchecked": report.unchecked,
        }
        if report.of_run is not None:
            from gold.doctor.memory_table import memory_json  # needs torch

            content["memory"] = memory_json(report.of_run)
        terminal.show_json(content, out)
    elif out.isatty():
        _print_table(report, out)
    else:
        for finding in report.checks:
            terminal.show(f"{finding.status}  {finding.check}: {finding.found}", stream=out)
            if finding.advice:
                terminal.show(f"      -> {finding.advice}", stream=out)
        for line in report.unchecked:
            terminal.show(f"not checked: {line}", stream=out)
        terminal.show(verdict_line(report), stream=out)
    if report.of_run is not None and not as_json:
        from gold.doctor.memory_table import memory_lines

        terminal.show("", *memory_lines(report.of_run), stream=out)


def verdict_line(report: Report) -> str:
    """Whether the pair can be trained, or why not, in one line."""
    failed = [f"{finding.check}: {finding.found}" for finding in report.failures]
    return f"{report.verdict}: {_VERDICTS[report.verdict]}" + (f": {'; '.join(failed)}" if failed else "")


def _print_table(report: Report, out: TextIO) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal.new_console(out)
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in (None, "bold", None):
        table.add_column(style=style or "", no_wrap=style is not None)
    for finding in report.checks:
        found = Text(terminal.line(finding.found))
        if finding.advice:
            found.append(f"\n→ {terminal.line(finding.advice)}", "italic")
        table.add_row(Text(finding.status, _STYLES[finding.status]), finding.check, found)
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


def memory_finding(needed: StepMemory) -> Finding:
    """A check that one step fits into this machine's memory."""
    millions = f"{_gib(needed.teacher)} ({needed.teacher_parameters / 1e6:,.0f} M)"
    trained = (
        f"× {needed.student // needed.student_parameters} bytes: weights, gradients, AdamW"
        if needed.trained_parameters is None
        else f"frozen, {needed.trained_parameters / 1e6:,.1f} M of adapters trained"
    )
    found = (
        f"{_gib(needed.total)} for {needed.sequences} × {needed.tokens} tokens: student {_gib(needed.student)} "
        f"({needed.student_parameters / 1e6:,.0f} M {trained}), activations "
        f"{_gib(needed.activations)}, logits {_gib(needed.logits)}, teacher "
        f"{millions}"
    )
    here = machine_memory()
    if here is None or needed.total <= here:
        return Finding("memory", "pass", found)
    return Finding(
        "memory",
        "warn",
        found,
        f"this machine has {_gib(here)} of main memory; use a GPU with that much memory, fewer --sequences "
        "(train.micro_batch_size or micro_batch_tokens), or train.gradient_checkpointing",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
