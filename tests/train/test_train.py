"""Training itself: what a step computes, whatever the batching; what is refused; what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from support.kernel_inputs import BACKENDS_HERE
from support.trackers import Recorder

from gold.align.batch import AlignedBatch
from gold.data import Prompt
from gold.demo.models import character_tokenizer, tiny_model
from gold.errors import ConfigError, DataError, TeacherError, TrainingError
from gold.kernels import use_backend
from gold.kernels.logits import GivenLogits
from gold.losses import OBJECTIVES, DivergenceRow, Loss, LossInputs, Row, reverse_kl
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.run import evaluate_source
from gold.train.loop import Run, Saving, distill
from gold.train.preflight import check_recipe
from gold.train.recipe import Recipe, Term
from gold.train.state import load_optimizer

RECIPE = Recipe(
    steps=3,
    num_generations=2,
    prompts_per_step=4,
    micro_batch_size=8,
    generation_batch_size=8,
    lr=3e-3,
    warmup_steps=1,
    max_new_tokens=10,
)
PHASES = ("rollout_s", "align_s", "teacher_s", "student_s", "update_s")


def run(recipe: Recipe = RECIPE, student: LanguageModel | None = None, **options: Any) -> Run:
    options = {"teacher": tiny.tiny_teacher(), "prompts": tiny.prompts(), "verifier": tiny.TASK} | options
    return distill(student or tiny.tiny_student(), recipe=recipe, **options)


def weights(model: LanguageModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.lm.parameters()])


def changed(**changes: Any) -> Recipe:
    return RECIPE.replace(**changes)


# Metrics of objectives


def test_every_part_of_a_loss_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(inputs: LossInputs, *, times: int = 1) -> Loss:
        """Twice the number of tokens as parts; one of them has the name of another metric."""
        count = torch.tensor(2.0 * times * inputs.batch.student.targets.numel())
        return Loss(
            0.0 * inputs.student.logits().sum(), {"pairs": count, "lr": count}, details={"own": count}
        )

    def tokens(batch: AlignedBatch) -> float:
        return float(batch.student.targets.numel())

    for name in ("counted", "thrice"):
        row = Row(name, counted, needs="nothing", unit="token", count=tokens)
        monkeypatch.setitem(OBJECTIVES, name, row)
    terms = (Term("counted"), Term("thrice", times=3))
    (record, *_) = run(changed(objectives=terms, steps=1)).steps
    assert record["pairs"] == record["counted.lr"] == pytest.approx(2.0)
    assert record["lr"] != 2.0
    assert "own" not in record


# Learning


@pytest.mark.parametrize(
    "objective", ["reverse_kl", *(pytest.param(o, marks=pytest.mark.slow) for o in ("forward_kl", "jsd"))]
)
def test_the_loss_falls_and_evaluations_show_it(objective: str) -> None:
    done = run(
        changed(objectives=(Term(objective),), steps=16, lr=1e-2, prompts_per_step=8),
        heldout=tiny.heldout(12),
        saving=Saving(evaluate_every=100),
    )
    losses = [record["loss"] for record in done.steps]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(record["applied"] for record in done.steps)
    before, after = done.evaluations
    assert (before["step"], after["step"]) == (0, 16)
    assert after["reverse_kl_per_byte"] < 0.8 * before["reverse_kl_per_byte"]
    assert after["forward_kl_per_byte"] < before["forward_kl_per_byte"]
    for measure in ("bits_per_byte", "stop_rate", "length_tokens", "canonical_share", "accuracy_low"):
        assert math.isfinite(after[measure])
    assert not done.student.lm.training


# One step is the same however it is cut


@pytest.mark.parametrize(
    "objectives",
    [
        (Term("reverse_kl"),),
        (Term("jsd", support="shared", beta=0.3),),
        (Term("span_pg", weight=0.5), Term("forward_kl")),
        (Term("reverse_kl"), Term("sft"), Term("reward", weight=0.1)),
    ],
    ids=lambda terms: "+".join(t.name for t in terms),
)
def test_losses_are_divided_by_the_count_of_the_whole_step(objectives: tuple[Term, ...]) -> None:
    recipe = changed(objectives=objectives, on_policy=0.6, steps=1, prompts_per_step=6, lr=1e-2)
    at_once = run(recipe.replace(micro_batch_size=64))
    in_parts = run(recipe.replace(micro_batch_size=3, generation_batch_size=5))
    by_tokens = run(recipe.replace(micro_batch_tokens=50))
    # The gradient's norm, not only the weights: AdamW's first step hardly depends on the gradient's size.
    for name, value in at_once.steps[0].items():
        if isinstance(value, float) and not name.endswith("_s"):
            assert in_parts.steps[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            assert by_tokens.steps[0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(weights(in_parts.student), weights(at_once.student), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(weights(by_tokens.student), weights(at_once.student), rtol=1e-3, atol=1e-3)


def test_a_baseline_is_of_the_whole_step() -> None:
    """Whatever microbatches the step is cut into."""
    recipe = changed(
        objectives=(Term("token_pg", baseline="others"),), steps=1, prompts_per_step=6, num_generations=1
    )
    losses = [run(recipe.replace(micro_batch_size=n), verifier=None).steps[0]["loss"] for n in (6, 2, 1)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    plain = run(recipe.replace(objectives=(Term("token_pg"),)), verifier=None).steps[0]["loss"]
    assert abs(plain - losses[0]) > 0.1 * abs(plain)


@pytest.mark.parametrize(("share", "num_generations"), [(0.5, 4), (0.25, 2), (0.9, 8), (0.0, 4), (1.0, 4)])
def test_lambda_is_the_share_of_sequences(share: float, num_generations: int) -> None:
    recipe = changed(on_policy=share, num_generations=num_generations)
    written = sum(recipe.student_writes(step, place) for step in range(500) for place in range(8))
    sequences = written * num_generations + (4000 - written)
    assert written * num_generations / sequences == pytest.approx(share, abs=0.03)


ON_ANY_DEVICE = [
    Term("reverse_kl"),
    Term("reverse_kl", support="prefix"),
    Term("forward_kl", support="shared"),
    *map(Term, ("span_pg", "token_pg", "alm", "uld", "gold", "x_token", "sft")),
]
ONE_STEP = changed(steps=1, prompts_per_step=2, num_generations=1, precision="no")


def one_step(term: Term) -> Recipe:
    return ONE_STEP.replace(objectives=(term,), on_policy=0.0 if term.name == "sft" else 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "term", ON_ANY_DEVICE, ids=lambda term: "-".join([term.name, *term.options.values()])
)
def test_a_step_on_a_gpu_is_that_of_a_cpu(term: Term) -> None:
    recipe = one_step(term)
    (expected,) = run(recipe).steps
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    for model in (student, teacher):
        model.lm.to("cuda")
    (found,) = run(recipe, student, teacher=teacher).steps
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif("cuda" not in BACKENDS_HERE, reason="triton does not run here")
@pytest.mark.parametrize(
    "term", ON_ANY_DEVICE, ids=lambda term: "-".join([term.name, *term.options.values()])
)
def test_a_step_with_triton_is_that_with_numba(term: Term) -> None:
    recipe = one_step(term)
    (expected,) = run(recipe).steps
    with use_backend("cuda"):
        (found,) = run(recipe).steps
    for name in ("loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    def counted(recipe: Recipe) -> tuple[Run, int]:
        passes: list[int] = []
        student = tiny.tiny_student()
        mlp = student.lm.model.layers[0].mlp
        with mlp.register_forward_pre_hook(lambda *_: passes.append(1)):
            return run(recipe, student), len(passes)

    (plain, passes), (checkpointed, more) = counted(RECIPE), counted(changed(gradient_checkpointing=True))
    assert more == passes + RECIPE.steps  # one forward pass a step is made again
    torch.testing.assert_close(weights(checkpointed.student), weights(plain.student), rtol=1e-4, atol=1e-6)
    assert [r["grad_norm"] for r in checkpointed.steps] == pytest.approx(
        [r["grad_norm"] for r in plain.steps]
    )


def test_runs_repeat_bit_by_bit_whatever_was_drawn_before() -> None:
    first = run()
    torch.rand(5)
    again = run()
    assert torch.equal(weights(first.student), weights(again.student))
    other = run(changed(seed=1))
    assert not torch.equal(weights(first.student), weights(other.student))


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32() -> None:
    done = run(changed(precision="bf16", steps=1))
    exact = run(changed(steps=1))
    assert weights(done.student).dtype == torch.float32
    assert done.steps[0]["grad_norm"] != exact.steps[0]["grad_norm"]
    assert done.steps[0]["loss"] == pytest.approx(exact.steps[0]["loss"], rel=0.2)


# Where sequences come from


def test_off_policy_learns_the_datas_completions_alone() -> None:
    done = run(changed(on_policy=0.0, objectives=(Term("sft"),), steps=20, lr=1e-2), teacher=None)
    assert done.steps[-1]["loss"] < 0.75 * done.steps[0]["loss"]
    assert all("stop_rate" not in record and "teacher_tokens" not in record for record in done.steps)


def test_lambda_mixes_completions_in() -> None:
    completions: list[int] = []

    class Counting(tiny.Verify):
        def score(self, prompt: Prompt, completion: str) -> float:
            completions.append(len(completion))
            return super().score(prompt, completion)

    objectives = (Term("reverse_kl"), Term("sft"))
    done = run(changed(on_policy=0.5, objectives=objectives, steps=6), verifier=Counting())
    # Only what the student wrote, and ended, is scored.
    assert 0 < len(completions) < 2 * 6 * RECIPE.prompts_per_step
    assert sum("sft" in record for record in done.steps) > 3
    assert all("reverse_kl_bytes" in record for record in done.steps)


def test_the_reward_moves_the_student() -> None:
    class Short:
        def score(self, prompt: Prompt, completion: str) -> float:
            return float(len(completion) < 10)

    recipe = changed(objectives=(Term("reward"),), steps=20, num_generations=8, lr=1e-2)
    done = run(recipe, teacher=None, verifier=Short())
    rewards = [record["reward_mean"] for record in done.steps]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_one_vocabulary_goes_token_by_token() -> None:
    sharp = tiny_model(character_tokenizer(), "teacher", layers=1, width=32, seed=9)
    student = tiny_model(character_tokenizer(), "student", layers=1, width=32, seed=8)
    seen = Recorder()
    done = run(changed(steps=1), student, teacher=sharp, progress=seen)
    record = done.steps[0]
    assert "reverse_kl_tokens" in record
    assert "token by token" in seen.run.header["objective"]
    assert record["shared_mass"] == pytest.approx(1.0, abs=1e-4)
    itself = tiny_model(character_tokenizer(), "teacher", layers=1, width=32, seed=8)
    student = tiny_model(character_tokenizer(), "student", layers=1, width=32, seed=8)
    assert run(changed(steps=1), student, teacher=itself).steps[0]["loss"] == pytest.approx(0.0, abs=1e-5)


def test_plain_strings_are_prompts() -> None:
    done = run(changed(steps=1), prompts=[" 24 +7 =", " 31 -3 =", " 12 +5 ="], verifier=None)
    assert done.steps[0]["applied"]
    assert "reward_mean" not in done.steps[0]


# What a step says


def test_every_step_tells_its_phases_and_speed() -> None:
    for record in run().steps:
        assert all(record[phase] >= 0 for phase in PHASES)
        assert record["step_s"] == pytest.approx(sum(record[phase] for phase in PHASES))
        assert record["tokens_per_s"] > 0
        assert record["lr"] > 0


# What is not finite


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the reverse KL of the steps that are named NaN or infinite."""

    def poison(value: float, calls: range) -> None:
        count = iter(range(-1, 10**6))  # it is called once before the first step

        def divergence(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
            return reverse_kl(logp, logq) * (value if next(count) in calls else 1.0)

        monkeypatch.setitem(OBJECTIVES, "reverse_kl", DivergenceRow("reverse_kl", divergence))

    return poison


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_applied(poisoned: Any, value: float) -> None:
    poisoned(value, range(1, 3))
    states: list[torch.Tensor] = []
    student = tiny.tiny_student()
    seen = Recorder(lambda _: states.append(weights(student).clone()))
    done = run(changed(steps=4), student, progress=seen)
    assert sum("NaN or infinite" in text for text in seen.notes) == 2
    assert [record["applied"] for record in done.steps] == [True, False, False, True]
    assert [record["bad_steps"] for record in done.steps] == [0, 1, 2, 0]
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[2], states[3])
    assert weights(student).isfinite().all()


def test_training_stops_after_a_few_bad_steps_with_a_checkpoint(
    poisoned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(math.nan, range(2, 100))
    with pytest.raises(TrainingError, match=r"step 5: 3 steps in a row .* the checkpoint of step 5 is kept"):
        run(changed(steps=20, bad_steps_allowed=2), saving=Saving(tmp_path / "run"))
    assert (tmp_path / "run/checkpoints/step-000005/student/model.safetensors").is_file()
    assert capsys.readouterr().err.count("the step was not applied") == 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, True]
    assert [line["applied"] for line in lines] == [True, True, False, False, False]


def test_a_weight_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    student = tiny.tiny_student()
    with torch.no_grad():
        student.lm.get_output_embeddings().weight[3, 3] = math.nan
    with pytest.raises(TrainingError, match="2 steps in a row"):
        run(changed(bad_steps_allowed=1), student, heldout=tiny.heldout())


@pytest.mark.parametrize(
    ("whose", "said"), [("student", "of the student"), ("teacher", "of teacher teacher")]
)
def test_a_step_that_is_not_finite_says_whose_logits_are_no_numbers(whose: str, said: str) -> None:
    models = {"student": tiny.tiny_student(), "teacher": tiny.tiny_teacher()}
    with torch.no_grad():
        models[whose].lm.get_output_embeddings().weight[3, 3] = math.nan
    with pytest.raises(TrainingError, match=rf"NaN logits {said} for prompt .* weights"):
        run(changed(bad_steps_allowed=0, objectives=(Term("token_pg"),)), **models)


def test_a_completion_that_the_student_rules_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    student, given = tiny.tiny_student(), tiny.prompts(4)
    token = int(student.vocabulary.encode(given[0].completion or "").ids[0])

    def without(lm: Any, states: Any) -> Any:
        rows = lazy_logits(lm, states)
        if lm is not student.lm:
            return rows
        logits = rows.logits().index_fill(1, torch.tensor([token]), -math.inf)
        return GivenLogits(logits)

    monkeypatch.setattr("gold.models.hidden_states.lazy_logits", without)
    monkeypatch.setattr("gold.train.diagnosis.lazy_logits", without)
    with pytest.raises(
        TrainingError, match=r"probability 0 to .* in the completion of prompt .*leave that prompt out"
    ):
        run(
            changed(bad_steps_allowed=0, on_policy=0.0, objectives=(Term("sft"),)),
            student,
            teacher=None,
            prompts=given,
        )


# What is refused


def test_what_the_teacher_or_the_data_lack_is_refused_at_once() -> None:
    untouched = tiny.tiny_student()
    before = weights(untouched).clone()
    bare = [Prompt(key="7", text=" 24 +7 =")]
    with pytest.raises(ConfigError, match=r"prompts_per_step is 4 for 5 processes"):
        check_recipe(RECIPE, tiny.prompts(), None, 5)
    with pytest.raises(DataError, match="no prompts to train on"):
        run(student=untouched, prompts=[])
    with pytest.raises(DataError, match=r"prompt 7 .* has no completion"):
        run(changed(on_policy=0.5), untouched, prompts=bare)
    with pytest.raises(ConfigError, match="objectives: reward needs a verifier"):
        run(changed(objectives=(Term("reward"),)), untouched, verifier=None)
    with pytest.raises(TeacherError, match="there is no teacher"):
        run(student=untouched, teacher=None)
    for key, value in (("temperature", 0.7), ("top_p", 0.5)):
        with pytest.raises(ConfigError, match=rf"rollout\.{key}: .* set it to 1"):
            run(changed(objectives=(Term("span_pg"),), **{key: value}), untouched)
    with pytest.raises(ConfigError, match="sft learns the data's completions"):
        run(changed(objectives=(Term("sft"),)), untouched)
    with pytest.raises(ConfigError, match="nothing would be learned"):
        run(changed(objectives=(Term("reverse_kl", weight=0.0),)), untouched)
    assert torch.equal(weights(untouched), before)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_prompt_that_does_not_fit_is_named_before_the_first_step(side: str, tmp_path: Path) -> None:
    long = Prompt(key="17", text=" 24" * 60 + " =")  # 61 tokens of the student, 182 of the teacher
    model = {"student": tiny.tiny_student(), "teacher": tiny.tiny_teacher()}
    model[side].lm.config.max_position_embeddings = 64
    model["teacher" if side == "student" else "student"].lm.config.max_position_embeddings = 1024
    with pytest.raises(DataError, match=f"prompt 17: .* of model {side}"):
        run(
            student=model["student"],
            teacher=model["teacher"],
            prompts=[*tiny.prompts(), long],
            saving=Saving(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


# What is kept


def test_the_student_loads_with_transformers_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(saving=Saving(tmp_path / "run"))
    folder = tmp_path / "run" / "student"
    lm = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in done.student.lm.state_dict().items():
        assert torch.equal(lm.state_dict()[name], value), name
    ids = tokenizer(" 24 +7 =", return_tensors="pt")
    assert lm.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert tokenizer(" 24 +7 =").input_ids == done.student.tokenizer(" 24 +7 =").input_ids


def test_saving_draws_no_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(saving=Saving(tmp_path / "run"), progress=Recorder())
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct.gguf")
def test_a_student_from_gguf_trains_and_saves(tmp_path: Path) -> None:
    from benchmarks.assets import assets_folder
    from gold.models.load import load_model

    student = load_model(assets_folder() / "gguf", gguf_file="smollm2-135m-instruct.gguf", device="cpu")
    before = weights(student).clone()
    recipe = changed(steps=1, prompts_per_step=2, lr=1e-5, max_new_tokens=4)
    run(recipe, student, verifier=None, saving=Saving(tmp_path / "run"))
    assert not torch.equal(weights(student), before)
    loaded = load_model(tmp_path / "run" / "student", device="cpu")
    assert torch.equal(weights(loaded), weights(student))


@pytest.mark.parametrize(
    ("objective", "start", "warned"),
    [
        ("reverse_kl", "confidently wrong", True),
        ("forward_kl", "confidently wrong", False),
        ("reverse_kl", "healthy", False),
    ],
)
def test_a_start_that_reverse_kl_cannot_move_is_told_with_what_helps(objective, start, warned) -> None:
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    if start == "healthy":
        teacher = tiny.tiny_student()
    else:
        with torch.no_grad():
            student.lm.get_output_embeddings().weight.mul_(30.0)
    seen = Recorder()
    distill(student, teacher, tiny.prompts(), changed(objectives=(Term(objective),), steps=2), progress=seen)
    found = [t for t in seen.notes if "begin with forward_kl" in t]
    assert len(found) == warned
    assert all("forward_kl" in t and "rollout.on_policy=0" in t for t in found)


def test_a_run_made_from_python_is_no_configuration_to_evaluate(tmp_path) -> None:
    recipe = changed(steps=1)
    distill(tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(), recipe, saving=Saving(tmp_path / "run"))
    with pytest.raises(ConfigError, match="the run was made from Python"):
        evaluate_source(tmp_path / "run")


def test_what_a_checkpoint_holds_of_the_optimizer_is_moments_alone(tmp_path: Path) -> None:
    """Rates and decays are the configuration's, which may have been changed on purpose."""
    weight = torch.nn.Parameter(torch.ones(3))
    one, other = (torch.optim.AdamW([weight], lr=lr, betas=(lr, lr), weight_decay=lr) for lr in (0.1, 0.2))
    weight.sum().backward()
    one.step()
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    load_optimizer(other, tmp_path / "optimizer.pt", weight.device)
    (group,) = other.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.2, 0.2), 0.2)
    assert torch.equal(other.state[weight]["exp_avg"], one.state[weight]["exp_avg"])
