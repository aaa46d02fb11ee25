"""What is known of where prompts were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gold.data.columns import UNDERSTOOD
from gold.errors import did_you_mean

_MOST_NAMED = 12


@dataclass(frozen=True)
class Facts:
    """A source of prompts: its name, its format, the number of its rows, and what was made of its columns.

    ``kinds`` counts the rows by the column that is the prompt. ``revision`` is the commit of a data set on the Hub, or
    the fingerprint of a saved one.
    """

    name: str
    format: str
    rows: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    blank_answers: int = 0
    revision: str | None = None

    @property
    def notes(self) -> list[str]:
        """What a user should know: columns that are not read, answers that are empty."""
        found = []
        if self.ignored:
            named = [f"{name}{did_you_mean(name, self._missing, '')}" for name in self.ignored[:_MOST_NAMED]]
            more = len(self.ignored) - _MOST_NAMED
            rest = f" and {more} more" if more > 0 else ""
            found.append(f"{self.name}: columns that are not read: {', '.join(named)}{rest}")
        if self.blank_answers:
            found.append(
                f"{self.name}: {self.blank_answers:,} of {self.rows:,} rows have an empty answer, which counts as none"
            )
        return found

    @property
    def _missing(self) -> list[str]:
        return [name for name in UNDERSTOOD if name not in self.used and name not in self.ignored]
