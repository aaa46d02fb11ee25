"""Tasks: splits that never meet, verifiers that know their own answers, nothing of a model's run as a program."""

import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.data import Prompt
from gold.errors import ConfigError, DataError
from gold.tasks import OWN_TASKS, extract_answer, load_task, score_of


@pytest.fixture(scope="module", autouse=True)
def _reasoning_gym():
    pytest.importorskip("reasoning_gym")


# -- the splits --


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 60))
def test_train_and_heldout_share_no_question_whatever_the_seeds(seed, other, count):
    task = load_task("chain_sum", max_terms=2, max_digits=1)  # few questions, so that seeds meet
    train = {p.messages[0]["content"] for p in task.prompts("train", count, seed)}
    heldout = {p.messages[0]["content"] for p in task.prompts("heldout", min(count, 20), other)}
    assert len(train) == count
    assert not train & heldout


@pytest.mark.parametrize("name", ["countdown", "chain_sum", "gsm_symbolic"])
def test_prompts_are_the_same_for_the_same_seed_and_a_longer_list_begins_alike(name):
    task = load_task(name)
    prompts = task.prompts("train", 12, 3)
    assert load_task(name).prompts("train", 12, 3) == prompts
    assert task.prompts("train", 5, 3) == prompts[:5]
    assert task.prompts("train", 12, 4) != prompts
    assert len({p.key for p in prompts}) == 12


@pytest.mark.slow  # loads all of reasoning_gym once more
def test_prompts_are_the_same_in_another_process():
    code = "from gold.tasks import load_task\nprint([p.key for p in load_task('gsm_symbolic').prompts('train', 6, 0)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([p.key for p in load_task("gsm_symbolic").prompts("train", 6, 0)])


def test_more_questions_than_there_are_is_an_error():
    task = load_task("chain_sum", max_terms=2, max_digits=1)
    with pytest.raises(
        DataError, match=r"'chain_sum' gave only \d+ distinct heldout questions in \d+ tries, 5000 were"
    ):
        task.prompts("heldout", 5000, 0)


def test_an_unknown_split_is_refused():
    with pytest.raises(
        ConfigError, match="expected a split of train or heldout and a count of 1 or more: test, 3"
    ):
        load_task("chain_sum").prompts("test", 3, 0)


# -- the verifiers --

VERIFIED = [
    "countdown",
    "chain_sum",
    "gsm_symbolic",
    "puzzle24",
    "n_queens",
    "spiral_matrix",
    "binary_matrix",
]
VERIFIED += ["string_insertion", "simple_integration", "intermediate_integration", "sudoku", "caesar_cipher"]


@pytest.mark.parametrize("name", VERIFIED)
def test_the_right_answer_scores_1_however_it_is_given_and_others_less(name):
    task = load_task(name)
    prompts = task.prompts("train", 3, 0)
    for prompt in prompts:
        answer = prompt.reference["answer"]
        assert task.score(prompt, f"Let me see.\nAnswer: {answer}\n") == 1.0
        assert task.score(prompt, f"<think>hm</think><answer>{answer}</answer>") == 1.0
        assert task.score(prompt, "") < 0.1
        assert task.score(prompt, "Answer: banana") < 0.1


def test_a_one_line_answer_alone_is_enough():
    task = load_task("chain_sum")
    (prompt,) = task.prompts("train", 1, 0)
    assert task.score(prompt, f"I add.\n\n {prompt.reference['answer']} \n") == 1.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_every_completion_has_a_score(completion):
    for name in ("countdown", "chain_sum"):
        task = load_task(name)
        (prompt,) = task.prompts("train", 1, 0)
        assert 0.0 <= task.score(prompt, completion) <= 1.0


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("countdown", "9**9**9**9**9"),
        ("countdown", "__import__('os').system('touch {path}')"),
        ("puzzle24", "9 ** 9 ** 9 ** 9"),
        ("string_insertion", "open('{path}', 'w')"),
        ("spiral_matrix", "[open('{path}','w')]"),
        ("spiral_matrix", "9**9**9**9**9"),
        (
            "n_queens",
            "[0 for a in 'aaaaaaaa' for b in 'aaaaaaaa' for c in 'aaaaaaaa' for d in 'aaaaaaaa' " * 4 + "]",
        ),
        ("simple_integration", "open('{path}', 'w')"),
        ("simple_integration", "9**9**9**9**9"),
        ("simple_integration", "9**(9**(9**9))"),
        ("simple_integration", "(((9**99)**99)**99)**99"),
        ("simple_integration", "x.__class__"),
    ],
)
def test_an_answer_is_never_run_as_a_program(name, answer, tmp_path):
    task = load_task(name)
    (prompt,) = task.prompts("train", 1, 0)
    path = tmp_path / "made"
    start = time.process_time()
    assert task.score(prompt, "Answer: " + answer.replace("{path}", str(path))) < 0.1
    assert time.process_time() - start < 2.0
    assert not path.exists()


def test_a_prompt_of_elsewhere_cannot_be_scored():
    with pytest.raises(DataError, match="prompt a holds no question of task 'chain_sum'"):
        load_task("chain_sum").score(Prompt("a", "x", reference={"answer": 1}), "1")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", ""),
        ("\n \n", ""),
        (" 42 ", "42"),
        ("first\n 42 \n\n", "42"),
        ("Answer: 41. No.\nAnswer: 42", "42"),
        ("the answer : 42", "42"),
        ("**Answer:** 42", "42"),
        ("Answer: **42**", "42"),
        ("Answer:\n1 2\n3 4\n", "1 2\n3 4"),
        ("<answer>42</answer> done", "42"),
        ("Answer: 1 <answer> 42 </ANSWER>", "42"),
        ("<answer>1</answer> Answer: 42", "42"),
        ("<answer>42", "42"),
        ("Answer:", ""),
        ("**", "**"),
        ("banswer: 3", "banswer: 3"),
    ],
)
def test_the_answer_is_found(completion, answer):
    assert extract_answer(completion) == answer


# -- names and options --


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, r"did you mean countdown\?"),
        ("running_sum", {}, r"did you mean running_sums\?"),
        ("composite", {}, "composite"),
        ("countdown", {"max_numbrs": 4}, r"did you mean max_numbers\?"),
        ("countdown", {"seed": 4}, "'seed'"),
        ("countdown", {"min_numbers": 9, "max_numbers": 4}, "min_numbers"),
        ("countdown", {"min_numbers": "four"}, "countdown"),
    ],
)
def test_bad_names_and_options_are_one_clear_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(name, **options)
    assert "\n" not in str(caught.value)


def test_options_are_used_and_lists_of_yaml_become_tuples():
    task = load_task("countdown", operators=["+"], min_numbers=3, max_numbers=3)
    for prompt in task.prompts("train", 5, 0):
        assert set(prompt.reference["answer"]) <= set("0123456789+ ")


def test_a_task_that_changes_with_the_hash_seed_wants_it_fixed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
        load_task("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load_task("ransom_note").prompts("train", 1, 0)


def test_without_reasoning_gym_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"gold-distill\[tasks\]"):
        load_task("countdown")


def test_an_own_task_is_loaded_from_the_table(monkeypatch):
    module = types.ModuleType("gold_task_of_a_test")

    class Echo:
        name = "echo"

        def __init__(self, length: int = 1):
            if length < 1:
                raise ValueError("length must be\npositive")
            self.length = length

    module.Echo = Echo
    monkeypatch.setitem(sys.modules, "gold_task_of_a_test", module)
    monkeypatch.setitem(OWN_TASKS, "echo", "gold_task_of_a_test:Echo")
    assert load_task("echo", length=3).length == 3
    with pytest.raises(ConfigError, match=r"did you mean length\?"):
        load_task("echo", lenght=3)
    with pytest.raises(ConfigError, match="length must be positive"):
        load_task("echo", length=0)


def test_the_demos_task_is_there_and_its_own_errors_pass():
    task = load_task("running_sums", highest=30)
    (prompt,) = task.prompts("heldout", 1, 0)
    assert task.score(prompt, prompt.completion) == 1.0
    with pytest.raises(ConfigError, match=r"^running_sums: needs"):
        load_task("running_sums", longest=0)


def test_the_module_does_not_load_reasoning_gym_by_itself():
    code = "import sys, gold.tasks\nassert not {'reasoning_gym', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_compiler_says_of_a_librarys_source_is_no_error_of_ours(monkeypatch, tmp_path):
    """Warnings are errors to some, and a source is compiled wherever its compiled form was not kept."""
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "factory.py").write_text("DATASETS = {'found': ()}\nx = 1 is 1\n")
    for name in [n for n in sys.modules if n.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'fond'; did you mean found"):
        load_task("fond")
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "given",
    [1, True, 1.0, np.float32(1), np.bool_(True), np.array(1.0), torch.tensor(1.0), torch.tensor([1])],
)
def test_a_score_is_whatever_is_one_number(given):
    assert score_of(given) == 1.0


@pytest.mark.parametrize(
    "given",
    [
        None,
        "1",
        "",
        b"1",
        [1.0],
        {},
        1j,
        float("nan"),
        -np.inf,
        10**400,
        np.array([1, 2]),
        torch.ones(2),
        object(),
    ],
)
def test_what_is_no_finite_number_is_no_score(given):
    with pytest.raises(DataError, match="expected a number"):
        score_of(given)
