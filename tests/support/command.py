"""The command line inside the test's own process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from gold.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_gold(
    patch: pytest.MonkeyPatch,
    capture: pytest.CaptureFixture[str],
    *arguments: object,
) -> Ended:
    """Exit code, stdout and stderr of ``gold`` with these arguments."""
    patch.setattr(sys, "argv", ["gold", *map(str, arguments)])
    capture.readouterr()
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return Ended(code, *capture.readouterr())
