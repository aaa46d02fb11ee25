"""The configuration keeps what it is given, refuses what cannot work, and says which key is at fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gold.config import Config, describe
from gold.errors import ConfigError
from gold.schema import RENAMED
from gold.train.recipe import Recipe, Term
from gold.train.run_folder import config_text

MINIMAL: dict[str, Any] = {
    "student": {"path": "models/student"},
    "teacher": {"path": "models/teacher"},
    "data": {"prompts": "prompts.jsonl"},
    "output": "runs/one",
}
TASK = {"task": {"name": "running_sums"}}


def changed(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, **sections}


def problems(tree: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.model_validate(tree)
    return str(caught.value).splitlines()


def problem(tree: Any) -> str:
    (line,) = problems(tree)
    return line


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


def load_problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    (line,) = str(caught.value).splitlines()
    return line


# Invariants

floats = st.floats(1e-9, 1e9)
counts = st.integers(1, 10**9)
# Much text that looks like a number or a word of YAML; no line breaks, which PyYAML folds (U+0085, U+2028).
characters = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])
texts = st.text(characters, min_size=1) | st.text("0123456789eE+-._:~xobnulyestrfINA", min_size=1, max_size=6)
divergences = st.fixed_dictionaries(
    {"name": st.sampled_from(["reverse_kl", "forward_kl", "jsd"]), "weight": st.floats(1e-6, 10)},
    optional={"support": st.sampled_from(["bytes", "shared", None])},
)
trees = st.fixed_dictionaries(
    {
        "student": st.fixed_dictionaries({"path": texts}),
        "teacher": st.fixed_dictionaries(
            {"path": st.just("t"), "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"])}
        ),
        "data": st.one_of(
            st.fixed_dictionaries({"prompts": texts}),
            st.fixed_dictionaries(
                {
                    "task": st.fixed_dictionaries(
                        {
                            "name": st.just("countdown"),
                            "options": st.dictionaries(
                                texts,
                                st.integers()
                                | st.floats(allow_nan=False, allow_infinity=False)
                                | texts
                                | st.booleans(),
                            ),
                        }
                    )
                }
            ),
        ),
        "output": texts,
    },
    optional={
        "objectives": st.lists(divergences, min_size=1, max_size=3),
        "optimizer": st.fixed_dictionaries(
            {},
            optional={"lr": floats | counts, "schedule": st.sampled_from(["linear", "cosine", "constant"])},
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"steps": counts, "precision": st.sampled_from(["auto", "no", "bf16"])}
        ),
    },
)


@given(trees)
def test_to_dict_is_json_and_gives_the_same_configuration_back(tree: dict[str, Any]) -> None:
    config = Config.model_validate(tree)
    written = json.loads(json.dumps(config.to_dict()))
    assert Config.model_validate(written) == config
    assert Config.model_validate(written).to_dict() == written


@given(trees)
def test_the_file_in_a_run_folder_gives_the_same_configuration_back(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = Config.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(config_text(config.to_dict()), encoding="utf-8")
    assert Config.load(path) == config


@pytest.mark.parametrize(
    "text", ["0.E0", "1e-5", ".5e3", "1.", "-.5", "+1.5E-3", "1_000", "0x1F", "12:30", "on"]
)
def test_a_text_that_looks_like_a_number_stays_text(tmp_path: Path, text: str) -> None:
    config = Config.model_validate(changed(output=text))
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config.to_dict()), encoding="utf-8")
    assert Config.load(path) == config


def leaves(tree: Any, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict) and tree:
        return [leaf for name, value in tree.items() for leaf in leaves(value, (*key, name))]
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return [leaf for index, value in enumerate(tree) for leaf in leaves(value, (*key, str(index)))]
    return [(key, tree)]


ALL_KEYS = leaves(Config.model_validate(MINIMAL).to_dict())


@pytest.mark.parametrize(("key", "value"), ALL_KEYS, ids=[".".join(key) for key, _ in ALL_KEYS])
def test_every_key_can_be_overridden_and_refuses_a_section(
    saved: Path, key: tuple[str, ...], value: object
) -> None:
    dotted = ".".join(key)
    assert Config.load(saved, [f"{dotted}={json.dumps(value)}"]) == Config.load(saved)
    with pytest.raises(ConfigError) as caught:
        # Arguments of a template may have any name but those that it is given anyway.
        Config.load(saved, [f"{dotted}={{{'messages' if 'template' in dotted else 'unknown'}: 1}}"])
    assert all(f": {dotted}" in line for line in str(caught.value).splitlines())


@pytest.mark.parametrize("key", [key for key, _ in ALL_KEYS if len(key[-1]) > 3], ids=".".join)
def test_a_misspelt_key_is_told_its_name(saved: Path, key: tuple[str, ...]) -> None:
    misspelt = ".".join((*key[:-1], key[-1][0] + key[-1][2:]))
    assert f"unknown key; did you mean {key[-1]}?" in load_problem(saved, f"{misspelt}=1", *required(key))


def required(key: tuple[str, ...]) -> list[str]:
    return ["data.task.name=x", "data.prompts=null"] if key[:2] == ("data", "task") else []


# Types


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "steps", "8", "a whole number"),
        ("train", "steps", True, "a whole number"),
        ("train", "steps", 8.0, "a whole number"),
        ("train", "steps", 0, ">= 1"),
        ("train", "seed", -1, ">= 0"),
        ("train", "gradient_checkpointing", 1, "true or false"),
        ("train", "precision", False, "auto | no | bf16"),
        ("optimizer", "lr", "1e-5", '"1e-5"'),
        ("optimizer", "lr", True, "a number"),
        ("optimizer", "lr", 0, "> 0"),
        ("optimizer", "lr", float("nan"), "NaN"),
        ("optimizer", "betas", [0.9], "betas.1"),
        ("optimizer", "betas", [0.9, 0.9, 0.9], "2 values"),
        ("optimizer", "betas", [0.9, 1], "betas.1: must be < 1"),
        ("optimizer", "betas", 0.9, "a list"),
        ("rollout", "temperature", 0, "> 0"),
        ("rollout", "top_p", 0, "> 0"),
        ("rollout", "top_p", 1.5, "<= 1"),
        ("rollout", "on_policy", -0.1, ">= 0"),
        ("rollout", "on_policy", 1.1, "<= 1"),
        ("data", "prompts", 3, "text"),
        ("student", "device", "gpu", "cuda:1"),
        ("student", "path", "", "empty"),
        ("student", "dtype", "bf16", "did you mean bfloat16?"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(section: str, key: str, value: object, said: str) -> None:
    line = problem(changed(**{section: {**MINIMAL.get(section, {}), key: value}}))
    assert line.startswith(f"{section}.{key}")
    assert said in line


def test_a_whole_number_is_a_number() -> None:
    config = Config.model_validate(changed(optimizer={"max_grad_norm": 1}))
    assert isinstance(config.optimizer.max_grad_norm, float)


def test_a_section_must_be_keys_and_values() -> None:
    assert problem(changed(teacher="gpt2")) == 'teacher: expected keys and values, got "gpt2"'
    assert problem("gpt2") == 'configuration: expected keys and values, got "gpt2"'


def test_a_missing_section_and_a_missing_key_are_named() -> None:
    assert problems({}) == [f"{name}: is missing" for name in ("student", "teacher", "data", "output")]
    assert problem(changed(student={})) == "student.path: is missing"


def test_a_key_of_another_section_is_sent_there() -> None:
    assert problem(changed(train={"lr": 1e-5})) == "train.lr: unknown key; did you mean optimizer.lr?"


def test_british_spelling_is_told_the_name_of_the_field() -> None:
    assert problem(changed(optimiser={})) == "optimiser: unknown key; did you mean optimizer?"


def test_every_problem_is_told_at_once() -> None:
    told = problems(changed(train={"steps": 0, "sead": 1}, rollout={"top_p": 2}))
    assert [line.split(":")[0] for line in told] == ["rollout.top_p", "train.steps", "train.sead"]


def test_a_configuration_does_not_change() -> None:
    config = Config.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


# Combinations


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {}}, "data:"),
        ({"data": {"prompts": "a", **TASK}}, "data:"),
        ({"data": {"heldout": "a", **TASK}}, "data.heldout"),
        ({"objectives": []}, "objectives:"),
        ({"objectives": [{"name": "jsd", "weight": 0}]}, "objectives:"),
        ({"objectives": [{"name": "reward"}]}, "data.task"),
        (
            {"data": TASK, "objectives": [{"name": "reward"}], "rollout": {"num_generations": 1}},
            "rollout.num_generations:",
        ),
        ({"objectives": [{"name": "span_pg"}], "rollout": {"temperature": 0.7}}, "importance_cap"),
        ({"objectives": [{"name": "span_pg"}], "rollout": {"top_p": 0.9}}, "rollout.top_p:"),
        (
            {"objectives": [{"name": "span_pg", "importance_cap": 2.0}], "rollout": {"top_p": 0.9}},
            "rollout.top_p:",
        ),
        ({"objectives": [{"name": "span_pg"}], "rollout": {"on_policy": 0}}, "rollout.on_policy:"),
        ({"objectives": [{"name": "sft"}]}, "rollout.on_policy:"),
        ({"objectives": [{"name": "sft", "support": "bytes"}]}, "objectives.0.support:"),
        ({"objectives": [{"name": "span_pg", "support": "shared"}]}, "objectives.0.support:"),
        ({"objectives": [{"name": "reward", "support": "bytes"}]}, "objectives.0.support:"),
        ({"objectives": [{"name": "reverse_kl", "beta": 0.5}]}, "objectives.0.beta:"),
        ({"objectives": [{"name": "jsd", "beta": 1.5}]}, "objectives.0.beta:"),
        ({"objectives": [{"name": "jsd", "weight": -1}]}, "objectives.0.weight:"),
        ({"objectives": [{"name": "jsd", "unshared": "bucket"}]}, "objectives.0.unshared:"),
        ({"objectives": [{"name": "reverse_lk"}]}, "did you mean reverse_kl?"),
    ],
)
def test_an_impossible_combination_is_refused(sections: dict[str, Any], said: str) -> None:
    assert said in problem(changed(**sections))


def test_an_objective_without_weight_asks_for_nothing() -> None:
    objectives = [{"name": "reverse_kl"}, {"name": "reward", "weight": 0}, {"name": "sft", "weight": 0}]
    Config.model_validate(changed(objectives=objectives, rollout={"num_generations": 1, "temperature": 0.7}))


def test_defaults_that_depend_on_the_objective_are_written_out() -> None:
    objectives = [{"name": "jsd"}, {"name": "forward_kl", "support": "shared"}, {"name": "span_pg"}]
    first, second, third = (
        o.options for o in Config.model_validate(changed(objectives=objectives)).objectives
    )
    assert (first["support"], first["beta"], "unshared" in first) == ("bytes", 0.5, False)
    assert (second["support"], second["unshared"], "beta" in second) == ("shared", "bucket", False)
    assert (third["clip"], third["noncanonical_penalty"], "support" in third) == (None, 0.0, False)


def test_the_default_is_on_policy_reverse_kl_on_bytes() -> None:
    config = Config.model_validate(MINIMAL)
    (objective,) = config.objectives
    assert (objective.name, objective.options["support"], config.rollout.on_policy) == (
        "reverse_kl",
        "bytes",
        1.0,
    )
    assert (config.rollout.temperature, config.rollout.top_p) == (1.0, 1.0)


# Files


def test_scalars_are_those_of_yaml_1_2(saved: Path) -> None:
    saved.write_text(
        saved.read_text() + "train: {precision: no}\noptimizer: {lr: 1e-5}\n"
        "evaluate: {samples: +3}\nrollout: {temperature: .5}\n"
    )
    config = Config.load(saved)
    assert config.train.precision == "no"
    assert config.optimizer.lr == 1e-5
    assert config.evaluate.samples == 3
    assert config.rollout.temperature == 0.5


@pytest.mark.parametrize("text", ["1_000", "010", "1:30", "0x10", "yes", "2026-01-01", "'8'"])
def test_text_that_only_looks_like_a_number_is_not_one(saved: Path, text: str) -> None:
    assert "train.steps: expected a whole number" in load_problem(saved, f"train.steps={text}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": is empty; a run needs"),
        ("# nothing\n", ": is empty; a run needs"),
        ("- 1\n", ": expected sections such as student and teacher, got [1]"),
        ("a: 1\nb: 2\na: 3\n", ":3: key 'a' is given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2\n", ":3: key 'b' is given twice, first on line 2"),
        ("a: [1\nb: 2\n", ":2: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", ":2: found character '\\t' that cannot start any token"),
        ("1: 2\n", ":1: a key must be text, got 1"),
        ("[a]: 2\n", ":1: a key must be text, got "),
        ("a: !!python/object:os.system 1\n", ":1: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", ":2: expected a single document in the stream, but found another document"),
        ("a: \x00\n", ": is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(saved: Path, text: str, said: str) -> None:
    saved.write_text(text)
    assert load_problem(saved).startswith(f"{saved}{said}")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert load_problem(tmp_path / "no.yaml").endswith("no.yaml cannot be read: No such file or directory")
    assert load_problem(tmp_path).endswith("cannot be read: Is a directory")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    assert load_problem(tmp_path / "latin.yaml").endswith("latin.yaml is not UTF-8 text (byte 3)")


def test_a_problem_names_the_line_of_its_key(saved: Path) -> None:
    minimal = saved.read_text()
    for wrong, said in (
        ("train:\n  steps: 3\n  sead: 0\n", "train.sead: unknown key; did you mean seed?"),
        (
            "train:\n  steps: 3\nobjectives:\n- weight: 1\n  name: kl\n",
            "objectives.0.name: unknown objective",
        ),
        ("train: {seed: 0}\nrollout:\n  top_p: 0.5\nobjectives: [{name: span_pg}]\n", ""),
    ):
        saved.write_text(minimal + wrong)
        line = len((minimal + wrong).splitlines()) - (not said)
        assert load_problem(saved).startswith(f"{saved}:{line}: {said}")


@pytest.mark.parametrize(("old", "new"), [pair for pair in RENAMED.items() if pair[0] != "recipe.sampling"])
def test_a_renamed_key_is_told_its_name(saved: Path, old: str, new: str) -> None:
    if old.startswith("recipe."):
        with pytest.raises(ConfigError) as caught:
            Recipe(**{old.split(".")[1]: 1})
        assert new.removeprefix("recipe.") in str(caught.value)
    else:
        assert f"{old}: unknown key; did you mean {new}?" in load_problem(saved, f"{old}=1")


def test_an_argument_of_a_recipe_is_judged_as_its_key() -> None:
    for changes, said in (
        ({"lr": -1}, "lr: must be > 0, got -1"),
        ({"schedule": "cosin"}, "did you mean cosine?"),
        ({"stepz": 3}, "stepz: unknown key; did you mean steps?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            Recipe(**changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight: must be >= 0"):
        Term("jsd", -1)
    assert Config.model_validate(MINIMAL).recipe == Recipe((Term("reverse_kl").resolved(),))
    assert Recipe(steps=3).replace(lr=1).steps == 3


def test_a_missing_key_names_the_line_of_its_section(saved: Path) -> None:
    saved.write_text("student: {path: a}\nteacher: {}\ndata: {prompts: p}\noutput: o\n")
    assert load_problem(saved) == f"{saved}:2: teacher.path: is missing"


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_committed_configuration_loads(path: Path) -> None:
    Config.load(path)


# Overrides


def test_overrides_apply_in_their_order_and_make_sections(saved: Path) -> None:
    config = Config.load(
        saved, ["train.steps=3", "train.steps=4", "data={prompts: null}", "data.task.name=countdown"]
    )
    assert config.train.steps == 4
    assert config.data.prompts is None
    assert config.data.task is not None
    assert config.data.task.name == "countdown"


def test_a_list_item_is_addressed_by_its_index(saved: Path) -> None:
    config = Config.load(saved, ["objectives=[{name: jsd}, {name: forward_kl}]", "objectives.1.weight=0.5"])
    assert [objective.weight for objective in config.objectives] == [1.0, 0.5]
    assert Config.load(saved, ["objectives.0.name=forward_kl"]).objectives[0].name == "forward_kl"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "override train.steps: expected section.key=value"),
        ("=3", "override =3: expected section.key=value"),
        ("train..steps=3", "override train..steps=3: expected section.key=value"),
        ("train.steps=[1", "override train.steps=[1: expected ',' or ']'"),
        ("output.x=1", 'override output.x=1: output is "runs/one", which has no keys'),
        (
            "objectives.1.weight=2",
            "override objectives.1.weight=2: there is no objectives.1: the last is 0",
        ),
        ("objectives.x.weight=2", "override objectives.x.weight=2: there is no objectives.x: the last is 0"),
        ("train.steps=0", "override train.steps=0: train.steps: must be >= 1, got 0"),
        ("train={steps: 0}", "override train={steps: 0}: train.steps: must be >= 1, got 0"),
        ("trian.steps=3", "override trian.steps=3: trian: unknown key; did you mean train?"),
    ],
)
def test_a_wrong_override_is_quoted(saved: Path, override: str, said: str) -> None:
    assert load_problem(saved, override).startswith(said)


def test_the_latest_origin_of_a_value_is_named(saved: Path) -> None:
    saved.write_text(saved.read_text() + "train:\n  steps: 3\n")
    assert load_problem(saved, "train.steps=0", "train={steps: -1}").startswith(
        "override train={steps: -1}: "
    )


# Help


def test_the_description_names_every_key_and_what_it_means() -> None:
    meanings = {line.split()[0]: line.split("  ")[-1] for line in describe().splitlines() if line.strip()}
    task_keys = leaves(Config.model_validate(changed(data=TASK)).to_dict())
    for key in {".".join(key) for key, _ in (*ALL_KEYS, *task_keys)}:
        if key.startswith("objectives.0.") and key not in meanings:
            continue  # an objective's own option
        assert len(meanings.get(key, meanings.get(f"{key}:", ""))) > 10, key
