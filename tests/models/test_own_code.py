"""Code that comes with a model runs where somebody has allowed it, and nobody is asked."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from accelerate import Accelerator
from transformers import dynamic_module_utils

from gold.cli import main
from gold.config import Config
from gold.diagnose import diagnose_run
from gold.doctor.report import diagnose, load_pair
from gold.errors import GoldError, ModelError
from gold.inspect.score import PairScorer
from gold.models.load import load_model, save_model
from gold.run import evaluate_source, train
from gold.teachers.several import Teachers
from gold.tokenize.vocabulary import Vocabulary
from gold.train.header import header
from gold.train.recipe import Recipe
from gold.train.setup import Setup
from gold.train.state import TrainState

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with code of its own, and the file that exists once that has run; on stdin somebody says yes."""
    folder, marker = tmp_path / "own", tmp_path / "marker"
    save_model(tiny.tiny_student(), folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        CODE.format(marker=str(marker))
        + "def generate(model, **given):\n    return type(model).generate(model, **given)\n"
    )
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    for file, changes in (
        ("config.json", {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
        ),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    return folder, marker


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    given = tiny.run_settings(folder.parent, folder.parent / "run", **changes)
    for side in ("student", "teacher"):
        given[side]["path"] = str(folder)
    return given


def align(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["gold", "align", "1 2", "--student", str(folder), "--teacher", str(folder)]
        )
        with contextlib.suppress(SystemExit):
            main()


def configured(act: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: act(tiny.write_settings(folder.parent / "run.yaml", settings(folder)))


@pytest.mark.parametrize(
    "enter",
    [
        pytest.param(load_model, id="load_model"),
        pytest.param(Vocabulary.load, id="Vocabulary.load"),
        pytest.param(lambda f: PairScorer.load(str(f), str(f)), id="align --score"),
        pytest.param(align, id="align"),
        pytest.param(lambda f: diagnose(f, f), id="doctor"),
        pytest.param(lambda f: diagnose(f, f, load=lambda: load_pair(f, f)), id="doctor --weights"),
        pytest.param(configured(lambda c: diagnose_run(c, weights=True)), id="doctor of a configuration"),
        pytest.param(configured(lambda c: train(Config.load(c))), id="train"),
        pytest.param(configured(evaluate_source), id="eval"),
    ],
)
def test_it_does_not_run_unasked(model: tuple[Path, Path], enter: Callable[[Path], Any]) -> None:
    folder, marker = model
    with contextlib.suppress(GoldError):
        enter(folder)
    assert not marker.exists()


def test_it_runs_with_consent_and_the_run_says_so(model: tuple[Path, Path]) -> None:
    folder, marker = model
    with pytest.raises(ModelError, match=r"tokenizer.*trust_remote_code: true"):
        load_model(folder)
    allowed = load_model(folder, trust_remote_code=True)
    assert marker.exists()
    assert allowed.runs_own_code
    teacher = tiny.tiny_teacher()
    assert not teacher.runs_own_code
    teachers, recipe = Teachers({"teacher": teacher}), Recipe()
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    setup = Setup.of(allowed, teachers, tiny.prompts(), recipe)
    lines = header(TrainState(allowed, teachers, recipe, accelerator), setup)
    assert "trust_remote_code" in lines["student"]
    assert "trust_remote_code" not in lines["teacher"]


def test_a_configuration_can_allow_it_of_each_model(model: tuple[Path, Path]) -> None:
    folder, _ = model
    config = Config.model_validate(settings(folder, student__trust_remote_code=True))
    assert config.student.trust_remote_code
    assert config.teacher is not None
    assert not config.teacher.trust_remote_code
    for wrong in ("yes", 1):
        with pytest.raises(GoldError, match="trust_remote_code"):
            Config.model_validate(settings(folder, student__trust_remote_code=wrong))


def test_kernels_of_the_hub_are_not_fetched_unasked(tmp_path: Path) -> None:
    save_model(tiny.tiny_student(), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        for value in ("someone/attention", {"": "someone/attention"}):
            file.write_text(json.dumps(content | {name: value}))
            with pytest.raises(ModelError, match=rf"{name} .*'someone/attention'.*trust_remote_code"):
                load_model(tmp_path)


def test_every_call_that_loads_says_whether_code_may_run() -> None:
    files = [*(ROOT / "gold").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    calls = [
        (p.name, n) for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)
    ]
    loading = [(name, n) for name, n in calls if getattr(n.func, "attr", "") == "from_pretrained"]
    # peft reads settings and tensors, and never code.
    loading = [(name, n) for name, n in loading if "PeftModel" not in ast.unparse(n.func)]
    assert len(loading) > 4
    for name, call in loading:
        assert "trust_remote_code" in {k.arg for k in call.keywords}, f"{name}:{call.lineno}"
