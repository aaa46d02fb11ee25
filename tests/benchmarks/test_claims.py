"""The records of the claims are those that the page of evidence shows."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.claims import PARTS
from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
RECORDS = sorted(RESULTS.glob("claims-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_the_page_has_the_table_and_the_picture_of_a_record(path: Path) -> None:
    record, page = json.loads(path.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    part = path.stem.removeprefix("claims-")
    assert part in PARTS
    assert import_module(f"benchmarks.claims.{part}").table(record["data"]) in page
    assert f"../benchmarks/results/{path.stem}.png" in page
    assert path.with_suffix(".png").is_file()
    assert record["command"].split(" --")[0] in page
    assert path.stat().st_size < 90_000
