"""The claim about training on exact tables: how ways are compared, and that a tiny run goes through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import branches
from benchmarks.claims.cells import Cells, Given

MEASURED = "bits_per_byte", "reverse_kl_per_byte", "exact_reverse_kl_per_byte"


def _row(way: str, seconds: float, bits: list[float]) -> dict[str, Any]:
    curve = [
        {
            "step": 25 * n,
            "cpu_s": seconds * n,
            "bits_per_byte": a,
            "reverse_kl_per_byte": 2.0 - n,
            "stop_rate": 1.0,
        }
        for n, a in enumerate(bits)
    ]
    result = {"curve": curve, "exact_reverse_kl_per_byte": 0.5, "branches": 0.0, "teacher_branches": 1.0}
    return branches._row(way, "pieces from characters", 5e-4, [result] * 3)


def test_ways_are_compared_at_equal_steps_and_at_equal_time(tmp_path: Path) -> None:
    data = {
        "starts": {
            "pieces from characters": dict.fromkeys(
                ("bits_per_byte", "reverse_kl_per_byte", "exact_reverse_kl_per_byte"), 2.0
            )
        },
        "rows": [_row("bucket", 10.0, [3.0, 2.5, 2.4]), _row("branches_1", 40.0, [3.0, 2.8, 2.0])],
    }
    bucket, exact = branches.compared(data, "pieces from characters")
    assert (bucket["cost"], exact["cost"]) == (1.0, 4.0)
    assert bucket["bits_per_byte"] == bucket["bits_per_byte_at_equal_time"]
    assert exact["bits_per_byte"]["mean"] == pytest.approx(2.0)
    assert exact["bits_per_byte_at_equal_time"]["mean"] == pytest.approx(2.9)  # half of its first 25 steps
    assert exact["reverse_kl_per_byte_at_equal_time"]["mean"] == pytest.approx(1.5)
    assert "| ×4.0 | 1.500 ± 0.000 | 2.900 ± 0.000 |" in branches.table(data)
    branches.draw(data, tmp_path / "branches.png")
    assert (tmp_path / "branches.png").stat().st_size > 5000


@pytest.mark.slow
def test_every_way_trains(tmp_path: Path) -> None:
    data = branches.measure(Given(Cells(tmp_path, 0), 1, True))
    assert len(data["rows"]) == 2 * len(branches.SMALL.ways) + 2 * 3  # late: the bucket and two with branches
    assert branches.table(json.loads(json.dumps(data))) == branches.table(data)
    found = {(row["way"], row["direction"]): row for row in data["rows"]}
    assert found["branches_1", "characters from pieces"]["teacher_branches"]["mean"] > 0
    assert found["branches_1", "pieces from characters"]["branches"]["mean"] > 0
