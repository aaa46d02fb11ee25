"""The programs in examples/ run, and the numbers worked by hand in docs/method.md are those of the code."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import oracle
from support.kernel_inputs import FORCED
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from gold.align.batch import AlignedBatch
from gold.align.chunks import align_tokens
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.kernels.logits import GivenLogits
from gold.kernels.tables import byte_tables
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.teachers import LocalTeacher
from gold.tokenize.vocabulary import Vocabulary

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def prompts():
    return RunningSums().prompts("train", 12, seed=0)


@pytest.fixture
def models(prompts) -> tuple[LanguageModel, LanguageModel]:
    """Two random models: whole numbers as tokens, and one token per character."""
    words = word_tokenizer([f"{p.text}{p.completion}" for p in prompts])
    return (
        tiny_model(words, "words", layers=1, width=32, seed=0),
        tiny_model(character_tokenizer(), "characters", layers=1, width=32, seed=1),
    )


def module_of(name: str):
    """An example as a module, its main part not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str | Path) -> None:
    """An example as a program."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


def test_every_example_is_run_here():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {"distill_api", "minimal_loop", "tiny_tokenizers"}


@pytest.mark.parametrize(
    "direction",
    [
        pytest.param(1, id="words learn"),
        pytest.param(-1, id="characters learn", marks=pytest.mark.slow),
    ],
)
def test_the_bare_loop_learns(models, prompts, direction):
    student, teacher = models[::direction]
    losses = list(module_of("minimal_loop").train(student, LocalTeacher(teacher), prompts, steps=10, lr=5e-3))
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_one_call_trains_models_in_folders(models, prompts, tmp_path, capsys):
    for model in models:
        save_model(model, tmp_path / model.name)
    lines = [json.dumps({"prompt": p.text}) for p in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run(
        "distill_api",
        tmp_path / "words",
        tmp_path / "characters",
        tmp_path / "prompts.jsonl",
        tmp_path / "run",
    )
    assert "the student is in" in capsys.readouterr().out
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").state_dict()
    begun = models[0].lm.state_dict()
    assert any(not torch.equal(trained[name], begun[name]) for name in begun)


def test_the_tiny_tokenizers_cut_the_text_as_method_md_says(tmp_path):
    run("tiny_tokenizers", tmp_path)
    student, teacher = (
        Vocabulary.load(tmp_path / f"{side}.json").encode("hello, world") for side in ("student", "teacher")
    )
    assert student.ends.tolist() == [3, 5, 6, 12]
    assert teacher.ends.tolist() == [2, 5, 6, 9, 12]
    assert align_tokens(student, teacher).chunks.tolist() == [[0, 2, 0, 2], [2, 3, 2, 3], [3, 4, 3, 5]]


# Section 4: tokens a, b, ab and a stop id, three states, the text ab in both of its segmentations.
STATES = {0: (0.5, 0.1, 0.3, 0.1), 1: (0.2, 0.6, 0.1, 0.1), 2: (0.2, 0.2, 0.1, 0.5)}
BY_HAND = {
    ("a", "b"): (
        {"a": 0.8, "b": 0.1, "stop": 0.1},
        {"a": 0.1875, "b": 0.75, "stop": 0.0625},
        {"a": 0.15, "b": 0.1, "stop": 0.25, "rest": 0.5},
    ),
    ("ab",): (
        {"a": 0.8, "b": 0.1, "stop": 0.1},
        {"b": 0.375, "rest": 0.625},
        {"a": 0.3, "b": 0.2, "stop": 0.5},
    ),
}
COLUMNS = {"a": ord("a"), "b": ord("b"), "stop": oracle.STOP, "rest": oracle.REST}


@pytest.mark.parametrize("tokens", list(BY_HAND))
@pytest.mark.parametrize("backend", FORCED, indirect=True)
def test_next_bytes_by_hand(tokens, backend):
    tokenizer: Tokenizer = module_of("tiny_tokenizers").tokenizer_of("a+b")
    stop = tokenizer.token_to_id("<eos>")
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[stop])
    names = ("a", "b", "ab", "<eos>")
    prob = torch.zeros(len(tokens) + 1, vocabulary.size, dtype=torch.float64)
    read = 0
    for row in range(len(tokens) + 1):
        # A state is known by the bytes that it has read.
        prob[row, [tokenizer.token_to_id(n) for n in names]] = torch.tensor(STATES[read]).double()
        read += len(tokens[row]) if row < len(tokens) else 0
    ids = [tokenizer.token_to_id(t) for t in tokens]
    tokenized = vocabulary.decode(ids)
    text = AlignedText(np.array([*ids, stop], np.int32), tokenized, tokenized, stopped=True)
    batch = AlignedBatch([text], VocabularyPair(vocabulary, vocabulary), torch.device("cpu"))
    table, _, _ = byte_tables(GivenLogits(prob.log()), batch.student.layout)
    expected = torch.zeros(3, 258, dtype=torch.float64)
    for byte, row in enumerate(BY_HAND[tokens]):
        for name, value in row.items():
            expected[byte, COLUMNS[name]] = value
    torch.testing.assert_close(table.exp(), expected)
