"""Findings, tables of checks, and the report of a pair."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from gold.doctor.side import Side
from gold.errors import ConfigError

if TYPE_CHECKING:
    from gold.doctor.memory_table import MemoryReport

Status = Literal["pass", "warn", "fail"]
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """The result of one check, and advice unless it passed.

    `concerns`: a warning that matters only to some runs names them, by objectives, by values of their options such as
    the support "shared", or by "messages" among the prompts.
    """

    check: str
    status: Status
    found: str
    advice: str = ""
    concerns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.check}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def passed(found: str) -> Finding:
    """A finding without a problem; the table of checks sets its name."""
    return Finding("", "pass", found)


def warning(found: str, advice: str, *concerns: str) -> Finding:
    """A finding that does not prevent training, or only for some runs."""
    return Finding("", "warn", found, advice, concerns)


def failure(found: str, advice: str = "") -> Finding:
    """A finding that prevents any run."""
    return Finding("", "fail", found, advice)


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One row of a table of checks: its name, its question, and the function that answers it."""

    name: str
    question: str
    answer: Callable[[Subject], Finding | list[Finding]]


def run_checks(checks: Iterable[Check[Subject]], subject: Subject) -> list[Finding]:
    """The findings of all checks, in order, with the names of their checks."""
    found: list[Finding] = []
    for check in checks:
        answer = check.answer(subject)
        answers = answer if isinstance(answer, list) else [answer]
        found += [replace(each, check=check.name) for each in answers]
    return found


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that stop a run."""
    return [finding for finding in findings if finding.status == "fail"]


def judge(
    findings: Sequence[Finding], concerns: Collection[str], *, stop: bool, whose: str = ""
) -> list[str]:
    """The notes that a run shows: failures, and warnings that concern it (`concerns`: its objectives and options).

    Raises:
        ConfigError: `stop` is set and a check has failed.
    """
    failed = failures(findings)
    if stop and failed:
        raise ConfigError(
            *(
                f"{whose}this pair cannot be trained: {finding} (train.doctor=report goes on)"
                for finding in failed
            )
        )
    return [
        f"{whose}{finding}"
        for finding in findings
        if finding.status != "pass"
        and (not finding.concerns or not set(finding.concerns).isdisjoint(concerns))
    ]


@dataclass(frozen=True)
class ClassCoverage:
    """How both sides tokenize the texts of a class.

    Shares of tokens and bytes in chunks of one token on both sides, bytes that a side's tokens do not reproduce,
    chunks, and tokens.
    """

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
    """All findings about a pair.

    `unchecked`: what could not be examined, and what would be needed. `sides`: student and teacher from their files, if
    those can be read. `of_run`: memory of a run on given GPUs.
    """

    checks: list[Finding]
    coverage: Mapping[str, ClassCoverage] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    sides: tuple[Side, ...] = ()
    of_run: MemoryReport | None = None

    @property
    def failures(self) -> list[Finding]:
        """The findings that prevent training."""
        return failures(self.checks)

    @property
    def verdict(self) -> Status:
        """The worst status of all findings."""
        found = {finding.status for finding in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"
