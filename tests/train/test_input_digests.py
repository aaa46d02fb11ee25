"""Digests of a run's inputs: the same for the same content wherever it lies, another for any change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from gold.data import Prompt
from gold.teachers.local import LocalTeacher
from gold.teachers.several import Teachers
from gold.train import input_digests
from gold.train.input_digests import of_files, of_model, of_prompts, of_run

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4).filter(str.strip)
PROMPTS = st.builds(
    Prompt,
    key=TEXTS,
    text=TEXTS,
    completion=st.none() | TEXTS,
    reference=st.none() | st.integers() | st.dictionaries(TEXTS, st.integers(), max_size=2),
    teacher_context=st.none() | TEXTS,
    route=st.none() | TEXTS,
)


@given(st.lists(PROMPTS, max_size=4), st.lists(PROMPTS, max_size=4))
def test_prompts_have_one_digest_exactly_where_they_are_equal(
    left: list[Prompt], right: list[Prompt]
) -> None:
    found = [of_prompts(prompts, "x")["digests"] for prompts in (left, right)]
    assert (found[0] == found[1]) == (repr(left) == repr(right))
    assert of_prompts(left, "y")["digests"] == found[0]


@given(
    st.integers(0, 400),
    st.integers(1, 9),
    st.integers(2, 9),
    st.booleans(),
)
def test_what_is_read_has_the_first_and_the_last_byte_and_no_more_than_said(
    size: int, block: int, count: int, whole: bool
) -> None:
    ranges = list(input_digests._spread(size, whole, block, count))
    read = [place for first, last in ranges for place in range(first, last)]
    assert read == sorted(set(read))
    if whole or size <= block * count:
        assert read == list(range(size))
    else:
        assert len(read) == block * count
        assert (read[0], read[-1]) == (0, size - 1)
        # A change of as many bytes in one piece as lie between two blocks is seen.
        gap = max(b[0] - a[1] for a, b in itertools.pairwise(ranges))
        assert gap <= -(-(size - block) // (count - 1)) - block + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_pair(tmp_path)
    return tmp_path / "student"


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    names = before["digests"].keys() | after["digests"].keys()
    return {name for name in names if before["digests"].get(name) != after["digests"].get(name)}


def test_every_file_that_is_loaded_counts_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = of_files(folder)
    assert first is not None
    assert {name.partition(" (")[0] for name in first["digests"]} == {path.name for path in folder.iterdir()}
    moved = folder.rename(folder.parent / "moved")
    (moved / "README.md").write_text("of no concern")
    assert of_files(moved)["digests"] == first["digests"]
    for name in list(first["digests"]):
        file = moved / name.partition(" (")[0]
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + b"X")
        assert changed(first, of_files(moved)) == {name}
        file.write_bytes(kept)
    without = of_files(moved, weights=False)
    assert changed(first, without) == {"model.safetensors (weights)"}
    assert of_files(moved / "nowhere") is None
    # Of a long file the ends are read, and what lies between blocks is not.
    monkeypatch.setattr(input_digests, "BLOCK_BYTES", 16)
    monkeypatch.setattr(input_digests, "BLOCKS", 4)
    sampled = of_files(moved)
    (moved / "model-2.safetensors").write_bytes(b"x" * 500)
    assert changed(sampled, of_files(moved)) == {"model-2.safetensors (weights)"}


def test_a_gguf_file_alone_counts(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"1")
    (tmp_path / "b.gguf").write_bytes(b"2")
    alone = of_files(tmp_path, "a.gguf")
    assert list(alone["digests"]) == ["a.gguf (weights and tokenizer)"]
    assert of_files(tmp_path / "a.gguf")["digests"] == alone["digests"]


@pytest.mark.parametrize("blocks", [input_digests.BLOCKS, 1])
def test_a_model_in_memory_is_known_by_its_weights_tokenizer_and_template(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setattr(input_digests, "BLOCKS", blocks)
    monkeypatch.setattr(input_digests, "BLOCK_BYTES", 4096 if blocks == 1 else input_digests.BLOCK_BYTES)
    model = tiny.tiny_student()
    first = of_model(model)
    assert of_model(tiny.tiny_student()) == first
    with torch.no_grad():
        model.lm.model.norm.weight[0] += 1.0  # the smallest of its tensors
    assert changed(first, of_model(model)) == {"weights"}
    model = tiny.tiny_student()
    model.tokenizer.chat_template = "{{ messages }}"
    assert changed(first, of_model(model)) == {"chat template"}
    other = replace(model, vocabulary=tiny.tiny_teacher().vocabulary)
    assert changed(first, of_model(other)) == {"chat template", "tokenizer"}


def test_a_run_from_python_names_all_that_it_is_given() -> None:
    teachers = Teachers(
        {"a": LocalTeacher(tiny.tiny_teacher()), "b": LocalTeacher(tiny.tiny_teacher(3))}, "linear"
    )
    found = of_run(tiny.tiny_student(), teachers, tiny.prompts(2), tiny.heldout(2))
    assert set(found) == {"student", "teacher.a", "teacher.b", "training prompts", "held-out prompts"}
    assert found["teacher.a"]["digests"]["weights"] != found["teacher.b"]["digests"]["weights"]
    assert set(of_run(tiny.tiny_student(), None, tiny.prompts(2), [])) == {
        "student", "training prompts", "held-out prompts",
    }  # fmt: skip
