"""How a run handles findings about a teacher: it stops at failures and notes relevant warnings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gold.data import Prompt
from gold.doctor.checks import examine_pair
from gold.doctor.finding import Finding, judge
from gold.doctor.sample import run_texts
from gold.doctor.server import compare_with_student, examine_noise, examine_server
from gold.doctor.side import Side
from gold.models.language_model import LanguageModel
from gold.teachers.served import ServedTeacher


@dataclass(frozen=True)
class Examiner:
    """Examines a teacher for a run, with the prompts that it scores.

    ``concerns``: the run's objectives and options, which select the warnings. ``stop``: a failed check is a
    ConfigError. ``whose`` is the prefix of each note. ``is_student``: the teacher has the files of the student.
    """

    prompts: Sequence[Prompt]
    concerns: frozenset[str]
    stop: bool
    whose: str
    note: Callable[[str], None]
    is_student: bool

    def report(self, findings: Sequence[Finding]) -> None:
        """Notes the findings that concern the run.

        Raises:
            ConfigError: a failed check, if the run is to stop at failures.
        """
        for line in judge(findings, self.concerns, stop=self.stop, whose=self.whose):
            self.note(line)

    def examine_pair(self, student: Side, teacher: Side) -> None:
        """Reports on both tokenizers."""
        self.report(examine_pair(student, teacher, run_texts(self.prompts)).checks)

    def examine_server(self, teacher: ServedTeacher) -> None:
        """Reports on a server's answers."""
        self.report(examine_server(teacher, self.prompts))

    def examine_noise(self, teacher: ServedTeacher) -> None:
        """Reports how much a server's answers to the same request differ."""
        self.report([examine_noise(teacher, self.prompts)])

    def compare(self, teacher: ServedTeacher, student: LanguageModel) -> None:
        """Compares a server's answers with the student's and reports the findings."""
        self.report(compare_with_student(teacher, self.prompts, student, is_student=self.is_student))
