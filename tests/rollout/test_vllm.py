"""The rollout engine on a vLLM server, against a double of it that fails when told to."""

from __future__ import annotations

import base64
import itertools
import pickle
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models as tiny
from support.architectures import tiny_lm, wrapped
from support.vllm_server import VLLMServer, engine_on

import gold
from gold import ConfigError, EngineError, Recipe
from gold.evaluate import EvaluationPlan
from gold.models.adapters import add_adapters
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Request
from gold.rollout.types import Sampling
from gold.rollout.vllm import ADAPTER, VLLMEngine, sampling_params, seed_number
from gold.train.loop import Saving
from gold.train.trackers import Tracker

RECIPE = Recipe(steps=3, prompts_per_step=2, num_generations=2, lr=1e-2, warmup_steps=1, max_new_tokens=6)
PUSH = [
    "/pause?mode=wait",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]
REQUEST = Request((3, 4, 5), (0, 1, 2), Sampling(max_new_tokens=8), (1,))


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return tiny.tiny_student()


@pytest.fixture(scope="module")
def other() -> LanguageModel:
    return tiny.tiny_student(seed=8)


@pytest.fixture(scope="module")
def sharp() -> LanguageModel:
    """With a distribution whose temperature can be told."""
    model = tiny.tiny_student()
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(8.0)
    return model


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return dict(model.lm.state_dict())


def trained(server: VLLMServer, steps: int = 3, retries: int = 3, **saving: Any) -> LanguageModel:
    engine, student = engine_on(server, retries=retries), tiny.tiny_student()
    recipe = RECIPE.replace(steps=steps)
    try:
        gold.distill(
            student, tiny.tiny_teacher(), tiny.prompts(), recipe, engine=engine, saving=Saving(**saving)
        )
    finally:
        engine.close()
    return student


@pytest.fixture(scope="module")
def faultless(student: LanguageModel) -> dict[str, torch.Tensor]:
    with VLLMServer(student) as server:
        return state(trained(server))


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


# Requests and pushes


def test_a_push_is_all_weights_under_each_name_while_nothing_is_drawn(
    student: LanguageModel, other: LanguageModel
) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server)
        engine.push(state(other), 7)
        engine.push(state(other), 8)
        assert server.paths == ["/init_weight_transfer_engine", *PUSH, *PUSH]
        assert_same(server.weights, state(other))  # with an output matrix of its own
        assert server.version.endswith(":8")
        assert engine.version == 8
        assert engine.push_s > 0
        files = [
            Path(body["update_info"]["path"]) for path, body in server.calls if path == "/update_weights"
        ]
    assert len(set(files)) == 2
    assert not any(file.exists() for file in files)


def test_a_draw_has_ids_log_probabilities_and_the_version_of_its_weights(student: LanguageModel) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server)
        engine.push(state(student), 3)
        sampled, greedy = engine.generate(
            [REQUEST, Request((3, 4), (0,), Sampling(temperature=0.0, max_new_tokens=4), (1,))]
        )
        assert sampled.version == greedy.version == 3
        assert (greedy.logprobs == 0).all()
        text = torch.tensor([[*REQUEST.prompt_ids, *sampled.ids.tolist()]])
        logp = torch.log_softmax(student.lm(text).logits[0, 2:-1], -1).gather(1, text[0, 3:, None])[:, 0]
        assert np.allclose(logp.detach().numpy(), sampled.logprobs, atol=1e-5)
        assert engine.generate([REQUEST])[0].ids.tolist() == sampled.ids.tolist()
        bodies = [body for path, body in server.calls if path == "/inference/v1/generate"]
    body = next(body for body in bodies if body["token_ids"] == [3, 4, 5])  # they arrive in any order
    assert body["model"] == "student"
    assert body["sampling_params"] == sampling_params(REQUEST)


def test_a_request_leaves_nothing_to_the_checkpoints_settings() -> None:
    assert sampling_params(REQUEST) == {
        "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "max_tokens": 8, "ignore_eos": True,
        "stop_token_ids": [1], "seed": seed_number((0, 1, 2)), "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    seeds = {seed_number((0, step, n)) for step, n in itertools.product(range(30), range(30))}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_lengths_are_checked_before_anything_is_asked(student: LanguageModel) -> None:
    with VLLMServer(student, context=10) as server:
        engine = engine_on(server)
        engine.push(state(student), 0)
        with pytest.raises(
            EngineError, match=r"3 tokens and 8 new ones do not fit its 10 .* --max-model-len 11"
        ):
            engine.generate([REQUEST])
        assert "/inference/v1/generate" not in server.paths


def test_nothing_is_drawn_before_a_push_or_after_one_that_failed(student: LanguageModel) -> None:
    broken = False
    with VLLMServer(
        student, faults=lambda path, n: "500" if broken and path == "/update_weights" else None
    ) as server:
        engine = engine_on(server, retries=1)
        with pytest.raises(EngineError, match="no weights of this run"):
            engine.generate([REQUEST])
        engine.push(state(student), 0)
        broken = True
        with pytest.raises(EngineError, match="EngineCore encountered an issue"):
            engine.push(state(student), 1)
        assert server.counts["/update_weights"] == 3
        assert server.paused
        with pytest.raises(EngineError, match="no weights of this run"):
            engine.generate([REQUEST])
        broken = False
        engine.push(state(student), 1)
        assert engine.generate([REQUEST])[0].version == 1
        assert not server.violations


def test_an_update_that_another_client_left_open_is_ended_first(student: LanguageModel) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server)
        engine.client.start_weight_update()
        engine.push(state(student), 0)
        assert engine.generate([REQUEST])[0].version == 0


def test_an_adapter_is_loaded_for_the_last_one_and_the_other_weights_stay(student: LanguageModel) -> None:
    weights, config = {"layer.lora_A.weight": torch.ones(2, 2)}, {"r": 2, "lora_alpha": 4}
    with VLLMServer(student) as server:
        engine = engine_on(server, retries=0)
        engine.push(state(student), 0)
        before = len(server.calls)
        engine.push_adapter(weights, 1, config)
        assert_same(weights, server.adapter or {})
        assert server.adapter_config == config
        assert server.paths[before:] == [
            "/pause?mode=wait", "/v1/unload_lora_adapter", "/v1/load_lora_adapter", "/update_weight_version",
            "/reset_prefix_cache", "/resume",
        ]  # fmt: skip
        assert not Path(server.calls[before + 2][1]["lora_path"]).exists()
        assert engine.generate([REQUEST])[0].version == 1
        raised = {name: 2.0 * weight for name, weight in weights.items()}
        engine.push_adapter(raised, 2, config)
        assert_same(raised, server.adapter or {})
        engine.generate([REQUEST])
        assert server.calls[-1][1]["model"] == ADAPTER
        engine.push(state(student), 3)
        engine.generate([REQUEST])
        assert server.calls[-1][1]["model"] == "student"
        server.faults = lambda path, n: "404" if path == "/v1/load_lora_adapter" else None
        with pytest.raises(EngineError, match=r"--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            engine.push_adapter(weights, 4, config)


@pytest.mark.parametrize("alone", [True, False])
def test_a_student_with_an_adapter_draws_from_it_alone_or_merged(student: LanguageModel, alone: bool) -> None:
    adapted = add_adapters(tiny.tiny_student(), rank=2)
    with VLLMServer(student, flaws=["old weights"] if alone else []) as server:
        engine = engine_on(server, adapters=alone, retries=0)
        recipe = RECIPE.replace(steps=2, prompts_per_step=1, num_generations=1, max_new_tokens=4)
        gold.distill(adapted, tiny.tiny_teacher(), tiny.prompts(8), recipe, engine=engine)
        assert server.counts["/v1/load_lora_adapter"] == (3 + 1) * alone
        assert server.counts["/update_weights"] == (3 + 1) * (not alone)
        assert not server.violations


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_that_sleeps_between_draws_has_its_weights_when_it_draws(
    student: LanguageModel, level: Any
) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server, sleep=level)
        engine.push(state(student), 0)
        first = engine.generate([REQUEST])[0]
        assert server.asleep == level
        second = engine.generate([REQUEST])[0]  # wakes up, without or with the weights pushed again
        assert first.ids.tolist() == second.ids.tolist()
        before = len(server.calls)
        engine.push(state(student), 1)
        assert server.paths[before:] == [
            "/wake_up?tags=weights",
            *PUSH[:4],
            "/wake_up?tags=kv_cache",
            *PUSH[4:],
        ]
        assert not server.violations


def test_the_weights_below_an_adapter_are_never_dropped(student: LanguageModel) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server, sleep=2)
        for version in (0, 1):
            engine.push_adapter({"layer.lora_A.weight": torch.ones(2, 2)}, version, {"r": 2})
            assert engine.generate([REQUEST])[0].version == version
            assert server.asleep == 1
        assert not server.violations


def test_of_several_processes_one_pushes_and_all_draw(student: LanguageModel) -> None:
    with VLLMServer(student) as server:
        first, second = engine_on(server), engine_on(server, pushes=False)
        first.push(state(student), 4)
        second.push(state(student), 4)
        assert server.counts["/update_weights"] == 1
        assert second.generate([REQUEST])[0].version == 4
        second.version = 3
        with pytest.raises(EngineError, match="drew from weights"):
            second.generate([REQUEST])


class Trainer:
    """vLLM's trainer engine as version 0.33 has it: what it asks of a client and a source, and in which order."""

    def __init__(self, info: Any, client: Any, source: Any) -> None:
        self.info, self.client, self.source, self.open = info, client, source, True

    def send_weights(self) -> None:
        meta = self.source.metadata()
        info = {
            "names": [m.name for m in meta],
            "dtype_names": [str(m.dtype).split(".")[-1] for m in meta],
            "shapes": [list(m.shape) for m in meta],
        }
        if self.info.backend == "ipc":
            info["ipc_handles"] = [{"GPU-1": (torch.Tensor, (0,))} for _ in meta]
        self.client.start_weight_update()
        pairs = list(self.source)
        assert [name for name, _ in pairs] == info["names"]
        self.wire[:] = [weight for _, weight in pairs]
        self.client.update_weights(info)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.open = False


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainer engines that were made by a double of vLLM's package."""
    made: list[Trainer] = []

    def init_info(backend: str) -> Any:
        return lambda **given: SimpleNamespace(backend=backend, **given)

    def trainer_init(info: Any, *, client: Any, source: Any) -> Trainer:
        client.init_weight_transfer_engine({"packed": True})
        made.append(Trainer(info, client, source))
        return made[-1]

    below = "vllm.distributed.weight_transfer"
    modules = {
        "vllm": {}, "vllm.distributed": {},
        below: {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init)},
        f"{below}.nccl_engine": {"NCCLTrainerInitInfo": init_info("nccl")},
        f"{below}.ipc_engine": {"IPCTrainerInitInfo": init_info("ipc")},
    }  # fmt: skip
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_weights_go_by_vllms_own_engines_under_all_their_names(
    student: LanguageModel,
    other: LanguageModel,
    trainers: list[Trainer],
    monkeypatch: pytest.MonkeyPatch,
    backend: Any,
) -> None:
    failing = False
    fault = lambda path, n: "500" if failing and path == "/update_weights" else None  # noqa: E731
    with VLLMServer(student, faults=fault) as server:
        monkeypatch.setattr(Trainer, "wire", server.wire, raising=False)
        engine = engine_on(server, transfer=backend, retries=1)
        engine.push(state(other), 1)
        engine.push(state(other), 2)
        assert len(trainers) == 1
        assert_same(server.weights, state(other))
        assert engine.generate([REQUEST])[0].version == 2
        given = vars(trainers[0].info)
        assert given["rank"] == 0
        if backend == "nccl":
            assert given["world_size"] == 3
            assert given["master_address"] == "127.0.0.1"
        else:
            info = next(body["update_info"] for path, body in server.calls if path == "/update_weights")
            assert len(pickle.loads(base64.b64decode(info["ipc_handles_pickled"]))) == len(state(other))
        # After a failure everything is connected anew.
        failing = True
        with pytest.raises(EngineError, match="EngineCore encountered an issue"):
            engine.push(state(student), 3)
        failing = False
        engine.push(state(student), 3)
        assert not trainers[0].open
        assert len(trainers) == 3
        assert_same(server.weights, state(student))
        engine.close()
        assert not trainers[-1].open
        assert server.paths[-1] == "/shutdown_weight_transfer_engine"


def test_vllms_own_engines_need_vllm_here_too(
    student: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with (
        VLLMServer(student) as server,
        pytest.raises(ConfigError, match=r"pip install 'gold-distill\[vllm\]'"),
    ):
        engine_on(server, transfer="nccl").push(state(student), 0)


# Faults


def push_and_draw(engine: VLLMEngine, model: LanguageModel) -> None:
    engine.push(state(model), 1)
    engine.generate([REQUEST])


PASSING = {
    "/inference/v1/generate": ("refused", "abort", "short", "other ids", "no number"),
    "/update_weights": ("500", "refused"),
    "/pause": ("500",),
    "/finish_weight_update": ("refused",),
    "/reset_prefix_cache": ("held",),
    "/v1/models": ("refused",),
}


def test_a_run_survives_every_fault_that_passes_with_the_same_weights(
    student: LanguageModel, faultless: dict[str, torch.Tensor]
) -> None:
    def fault(path: str, n: int) -> str | None:
        chance = random.Random(f"{path} {n}")
        return chance.choice(PASSING[path]) if path in PASSING and chance.random() < 0.3 else None

    with VLLMServer(student, faults=fault) as server:
        assert_same(faultless, state(trained(server, retries=12)))
        assert server.counts["/update_weights"] > 6
        assert not server.violations


@pytest.mark.parametrize(
    ("path", "fault", "line"),
    [
        ("/inference/v1/generate", "refused", "cannot be reached"),
        ("/inference/v1/generate", "abort", "ends a text with 'abort'"),
        ("/inference/v1/generate", "short", "of 8 tokens without a stop token"),
        ("/inference/v1/generate", "other ids", "of other tokens than those drawn"),
        ("/inference/v1/generate", "no number", "a log-probability that is none"),
        (
            "/inference/v1/generate",
            "restarted",
            "drew from weights default and not from .*:1: it was started again",
        ),
        ("/inference/v1/generate", "hung", "has not answered within 0.1 s"),
        ("/pause", "500", "CUDA error"),
        ("/update_weights", "500", "EngineCore encountered an issue"),
        ("/update_weights", "refused", "cannot be reached"),
        ("/update_weights", "hung", "has not answered within 0.1 s"),
        ("/finish_weight_update", "500", "CUDA error"),
        ("/reset_prefix_cache", "held", "its prefix cache was not reset"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_the_next_push_repairs_what_it_left(
    student: LanguageModel, other: LanguageModel, path: str, fault: str, line: str
) -> None:
    with VLLMServer(student) as server:
        engine = engine_on(server, retries=1)
        engine.push(state(student), 0)
        server.faults = lambda asked, n: fault if asked == path else None
        engine.server.timeout_s = 0.1 if fault == "hung" else 20.0
        with pytest.raises(EngineError, match=f"^server http.*{line}") as error:
            push_and_draw(engine, other)
        assert "\n" not in str(error.value)
        server.faults, engine.server.timeout_s = lambda asked, n: None, 20.0
        engine.push(state(other), 2)
        assert engine.generate([REQUEST])[0].version == 2
        assert_same(server.weights, state(other))
        assert not server.violations


def test_a_run_whose_server_fails_keeps_its_checkpoint_and_goes_on(
    student: LanguageModel, faultless: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    class Break(Tracker):
        def log(self, kind: str, record: Mapping[str, Any]) -> None:
            server.faults = lambda path, n: "500" if path == "/update_weights" else None

    with VLLMServer(student) as server:
        with pytest.raises(EngineError, match=r"^after step 1: server http.* issue.*checkpoint is kept"):
            gold.distill(
                tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(), RECIPE,
                engine=engine_on(server, retries=1), saving=Saving(tmp_path / "run"), trackers=[Break()],
            )  # fmt: skip
        server.faults = lambda path, n: None
        assert_same(faultless, state(trained(server, output=tmp_path / "run", resume=True)))
        assert not server.violations


def test_a_prompt_that_the_server_has_no_room_for_is_refused_before_the_first_step(
    student: LanguageModel,
) -> None:
    teacher = tiny.tiny_teacher()
    with VLLMServer(student, context=40) as server:
        longest = max(len(student.prompt_ids(p)) for p in tiny.prompts())
        for recipe, plan in (
            (RECIPE.replace(max_new_tokens=36), None),
            (RECIPE, EvaluationPlan(max_new_tokens=36)),
        ):
            with pytest.raises(
                EngineError,
                match=rf"^server http\S+: \d+ tokens and 36 new .* --max-model-len {36 + longest}",
            ):
                gold.distill(
                    student, teacher, tiny.prompts(), recipe,
                    heldout=tiny.prompts(), evaluation=plan, engine=engine_on(server),
                )  # fmt: skip
        assert set(server.paths) == {"/v1/models"}


# The probe


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"flaws": ["raw"]}, "--logprobs-mode processed_logprobs"),
        ({"flaws": ["stale head"]}, "keeps the old output matrix"),
        ({"flaws": ["unreset cache"]}, "--no-enable-prefix-caching"),
        ({"flaws": ["old weights"]}, "off the old ones"),
        ({"flaws": ["other bos"]}, "nats a token off"),
        ({"name": "llama"}, "--served-model-name student"),
        ({"scale_out": False}, "--enable-scale-out"),
        ({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"),
        (
            {"flaws": ["no transfer"]},
            """--weight-transfer-config '{"backend": "gold_file"}' and --worker-extension-cls""",
        ),
        ({"versions": False}, "vLLM 0.32 or later"),
        ({"context": 12}, "--max-model-len"),
    ],
)
def test_a_server_that_cannot_be_trained_with_is_refused_before_the_first_step(
    sharp: LanguageModel, options: dict[str, Any], line: str
) -> None:
    with VLLMServer(sharp, **options) as server:
        engine = engine_on(server, retries=0)
        with pytest.raises(EngineError) as error:
            engine.probe(sharp, tiny.prompts(), state(sharp), 0)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_works_has_the_students_weights_after_the_probe(
    student: LanguageModel, other: LanguageModel
) -> None:
    before = {name: weight.clone() for name, weight in state(other).items()}
    with VLLMServer(student) as server:
        engine = engine_on(server)
        engine.probe(other, tiny.prompts(), state(other), 5)
        assert_same(server.weights, before)
        assert_same(state(other), before)
        assert engine.version == 5
        assert server.counts["/update_weights"] == 3


def test_a_file_here_is_nothing_to_a_server_elsewhere(student: LanguageModel) -> None:
    with pytest.raises(EngineError, match=r"cannot read .* here; name a folder that both can open"):
        VLLMEngine("http://vllm.example", retries=0).push(state(student), 0)


def test_a_key_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine\.vllm\.key_env: the environment has no variable"):
        VLLMEngine("http://localhost:8000", key_env="NO_SUCH_KEY")


def test_experts_are_pushed_by_the_names_of_a_checkpoint(tmp_path: Path) -> None:
    lm = tiny_lm("qwen3_moe")
    model = wrapped(lm)
    lm.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    with VLLMServer(model) as server:
        engine_on(server).probe(model, tiny.prompts(), dict(lm.state_dict()), 0)
        assert not server.violations
    assert saved.keys() != lm.state_dict().keys()
    assert all(names == set(saved) for names in server.names)
    assert len(server.names) == 3
