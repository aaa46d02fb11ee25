"""A real vLLM server (`make vllm`), started by gold itself: probe, steps with pushed weights, and a resumption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models as tiny
from support.live_vllm import LIVE, PYTHON

import gold
from gold import EngineError, Recipe
from gold.models.adapters import adapter_state, add_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.rollout.engine import Generation, Request
from gold.rollout.vllm_process import ColocatedEngine, ServerCommand
from gold.train.loop import Saving

pytestmark = LIVE
# Nothing but the likeliest token is in the nucleus: both engines then write the same texts.
RECIPE = Recipe(
    steps=3, prompts_per_step=2, num_generations=2, lr=3e-3, warmup_steps=1, max_new_tokens=10, top_p=1e-6
)


def student() -> LanguageModel:
    model = tiny.tiny_student(width=128)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColocatedEngine]:
    folder = tmp_path_factory.mktemp("vllm")
    save_model(student(), folder / "student")
    command = ServerCommand(
        str(folder / "student"), str(PYTHON), "float32", context=128, arguments=["--enforce-eager"]
    )
    engine = ColocatedEngine(command, log=folder / "vllm.log")
    yield engine
    engine.close()
    assert engine.process is None


class Compared:
    """The engine, each of whose draws is compared with the student as it is at that moment."""

    def __init__(self, engine: ColocatedEngine, model: LanguageModel) -> None:
        self.engine, self.model, self.gaps, self.pushes = engine, model, list[float](), 0

    own_weights = True
    version = property(lambda self: self.engine.version)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        drawn = self.engine.generate(requests)
        for request, each in zip(requests, drawn, strict=True):
            text = torch.tensor([[*request.prompt_ids, *each.ids.tolist()]])
            start = len(request.prompt_ids)
            logits = self.model.lm(text).logits[0, start - 1 : -1].double()
            logp = torch.log_softmax(logits, -1).gather(1, text[0, start:, None])[:, 0].numpy()
            self.gaps.append(float(np.abs(np.exp(logp - each.logprobs) - 1.0).max()))
        return drawn

    def push(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.pushes += 1
        self.engine.push(weights, version)

    def close(self) -> None:
        pass


class AsPushed(Compared):
    """The engine, each of whose draws is compared with the weights that were pushed last."""

    def push(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.model.lm.load_state_dict(weights)
        super().push(weights, version)


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return dict(model.lm.state_dict())


def assert_near(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-4)


def test_steps_with_pushed_weights_draw_from_the_students_own_distribution(engine: ColocatedEngine) -> None:
    model = student()
    engine.probe(model, tiny.prompts(), state(model), 0)
    compared = Compared(engine, model)
    gold.distill(model, tiny.tiny_teacher(), tiny.prompts(), RECIPE.replace(top_p=1.0), engine=compared)
    assert compared.pushes == 3
    assert len(compared.gaps) == 12
    assert max(compared.gaps) < 1e-4


def test_completions_one_step_off_are_drawn_from_the_weights_before_the_last_update(
    engine: ColocatedEngine,
) -> None:
    recipe = RECIPE.replace(staleness=1, top_p=1.0)
    compared = AsPushed(engine, student())
    run = gold.distill(student(), tiny.tiny_teacher(), tiny.prompts(), recipe, engine=compared)
    assert compared.pushes == 2
    assert len(compared.gaps) == 12
    assert max(compared.gaps) < 1e-4
    assert [record["staleness"] for record in run.steps] == [0, 1, 1]
    first, *later = run.steps
    assert first["policy_log_ratio_abs"] < 1e-5
    assert all(record["policy_log_ratio_abs"] > 1e-3 for record in later)
    assert later[0]["engine_idle_s"] > 0  # no draw follows the last step


def test_a_run_one_step_off_ends_where_one_with_the_student_itself_ends(engine: ColocatedEngine) -> None:
    def run(used: Any, staleness: int) -> dict[str, torch.Tensor]:
        model = student()
        # Weights for older completions need the whole distribution, of which this nucleus has one token.
        recipe = RECIPE.replace(staleness=staleness, importance_cap=None)
        gold.distill(model, tiny.tiny_teacher(), tiny.prompts(), recipe, engine=used)
        return state(model)

    here, there, on_time = run(None, 1), run(engine, 1), run(None, 0)
    assert_near(here, there)
    assert any(not torch.allclose(on_time[name], here[name], atol=1e-3) for name in here)


def test_a_run_ends_where_one_with_the_student_itself_ends_and_can_be_resumed(
    engine: ColocatedEngine, tmp_path: Path
) -> None:
    def run(used: Any, **saving: Any) -> dict[str, torch.Tensor]:
        model = student()
        gold.distill(model, tiny.tiny_teacher(), tiny.prompts(), RECIPE, engine=used, saving=Saving(**saving))
        return state(model)

    here, there = run(None), run(engine)
    assert_near(here, there)
    start = state(student())
    assert any(not torch.allclose(start[name], here[name], atol=1e-3) for name in here)

    class Gone(Compared):
        def generate(self, requests: Sequence[Request]) -> list[Generation]:
            if self.version == 2:
                raise EngineError("the server is gone")
            return super().generate(requests)

    with pytest.raises(EngineError, match="after step 2: the server is gone; its checkpoint is kept"):
        gold.distill(
            student(), tiny.tiny_teacher(), tiny.prompts(), RECIPE,
            engine=Gone(engine, student()), saving=Saving(tmp_path / "run"),
        )  # fmt: skip
    assert_near(here, run(engine, output=tmp_path / "run", resume=True))


def test_adapters_alone_are_what_the_student_draws_from(tmp_path: Path) -> None:
    save_model(student(), tmp_path / "student")

    def run(used: Any) -> dict[str, torch.Tensor]:
        model = add_adapters(student(), rank=4)
        gold.distill(model, tiny.tiny_teacher(), tiny.prompts(), RECIPE.replace(lr=3e-2), engine=used)
        return adapter_state(model.lm)

    command = ServerCommand(
        str(tmp_path / "student"),
        str(PYTHON),
        "float32",
        context=128,
        lora_rank=4,
        arguments=["--enforce-eager"],
    )
    engine = ColocatedEngine(command, log=tmp_path / "vllm.log", adapters=True)
    try:
        there = run(engine)
    finally:
        engine.close()
    here = run(None)
    assert any(weight.abs().max() > 1e-2 for name, weight in here.items() if "lora_B" in name)
    assert_near(here, there)


def test_a_server_that_cannot_start_is_one_line_with_its_log(tmp_path: Path) -> None:
    engine = ColocatedEngine(ServerCommand(str(tmp_path / "nothing"), str(PYTHON)), log=tmp_path / "vllm.log")
    with pytest.raises(
        EngineError, match=r"vLLM ended with exit code 1: .*; its log is .*vllm\.log"
    ) as error:
        engine.push({}, 0)
    engine.close()
    assert "\n" not in str(error.value)
