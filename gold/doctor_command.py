"""`gold doctor`: two models, or a configuration. Tokenizer files alone are judged without loading torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gold.doctor.finding import Report
from gold.errors import ConfigError


def diagnose_source(
    student: str,
    others: Sequence[str],
    *,
    weights: bool,
    sequences: int | None,
    tokens: int | None,
    memory: float | None,
    hardware: Mapping[str, Any],
) -> Report:
    """The report on a student and the teacher in ``others``, or on a configuration and the overrides in it;
    ``memory``: GiB of each GPU of a run, and ``hardware``: further arguments of ``Hardware``.

    Raises:
        GoldError: as for ``gold.build.train``; or ConfigError for arguments that do not go together.
    """
    is_run = all("=" in each for each in others) and not Path(student).is_dir()
    if not is_run and not others:
        raise ConfigError(f"{student} is a folder: name the teacher too, or the YAML file of a run")
    if not is_run and Path(student).suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(
            f"{student} is a configuration, which names its models: give KEY=VALUE after it, not {others[0]}"
        )
    given = {name: value for name, value in hardware.items() if value is not None}
    if memory is None and given:
        raise ConfigError(f"--{next(iter(given))} goes with --memory, the GiB of each GPU: give that too")
    if is_run:
        from gold.diagnose import diagnose_run
        from gold.doctor.memory_table import Hardware

        there = None if memory is None else Hardware(memory=round(memory * 2**30), **given)
        sizes: Any = {"sequences": sequences, "tokens": tokens}
        return diagnose_run(Path(student), others, weights=weights, hardware=there, **sizes)
    if memory is not None:
        raise ConfigError("--memory is of a run: name its YAML file instead of two models")
    from gold.doctor.report import diagnose, load_pair

    load = partial(load_pair, student, others[0]) if weights else None
    return diagnose(student, others[0], load=load, sequences=sequences or 8, tokens=tokens or 256)
