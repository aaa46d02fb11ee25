"""What the release check says of archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.release import IN_SOURCES, IN_WHEEL, missing, names_in


@pytest.mark.parametrize(("archive", "wanted"), [("gold-1.tar.gz", IN_SOURCES), ("gold-1.whl", IN_WHEEL)])
def test_each_file_that_is_lacking_is_named(archive: str, wanted: tuple[str, ...]) -> None:
    whole = [f"{name}x" if name.endswith(("/", "-")) else name for name in wanted]
    assert missing(archive, whole) == []
    for name in whole:
        (fault,) = missing(archive, [other for other in whole if other != name])
        assert name.rstrip("x") in fault
    for stray in ("assets/model.safetensors", "runs/demo/config.yaml", ".venv/bin/python"):
        (fault,) = missing(archive, [*whole, stray])
        assert stray in fault


def test_names_are_those_in_the_checkout(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("gold/cli.py", "")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sources:
        sources.addfile(tarfile.TarInfo("gold-1/gold/cli.py"), io.BytesIO())
    assert names_in(tmp_path / "a.whl") == names_in(tmp_path / "a.tar.gz") == ["gold/cli.py"]
