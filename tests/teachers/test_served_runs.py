"""Runs, evaluations, checks and commands with a served teacher."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
import yaml
from support.command import run_gold
from support.server import APIS, PASSING, ModelServer, always, served

import gold.build
import gold.run
from gold import ConfigError, DataError, LocalTeacher, Prompt, Recipe, TeacherError, Term
from gold.config import Config
from gold.doctor.server import examine_noise, examine_own, examine_server
from gold.errors import TrainingError
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.train.loop import Saving, distill
from gold.train.progress import step_summary

RECIPE = Recipe(
    (Term("reverse_kl"), Term("span_pg", weight=0.5)),
    max_new_tokens=10,
    steps=3,
    prompts_per_step=3,
    num_generations=2,
    lr=3e-3,
    warmup_steps=1,
)


ONE_STEP = RECIPE.replace(objectives=(Term("reverse_kl"),), steps=1, prompts_per_step=2, max_new_tokens=6)


class Cutting(ModelServer):
    """Writes −9999 for all but the likeliest tokens of some requests, as vLLM does where it cuts them off."""

    cut: Any = staticmethod(lambda ids: True)
    likeliest = 3

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        told = super()._completion(body, fault)
        for entries in told["choices"][0]["prompt_logprobs"] if self.cut(body["prompt"]) else ():
            values = sorted((e["logprob"] for e in (entries or {}).values()), reverse=True)
            for entry in (entries or {}).values():
                left = math.log(sum(map(math.exp, values[: self.likeliest])))
                least = values[: self.likeliest][-1]
                entry["logprob"] = entry["logprob"] - left if entry["logprob"] >= least else -9999.0
        return told


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.lm.named_parameters()}


def trained(teacher: Any, recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    run = distill(tiny.tiny_student(), teacher, tiny.prompts(), recipe)
    return weights(run.student)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_survives_every_fault_that_passes_with_the_same_weights(
    teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        whole = trained(served(folder, server.url))
        kinds = [kind for kind in PASSING if kind != "slow"]
        # Every other request fails, each time in another way.
        server.scored, server.faults = 0, lambda n: kinds[n // 2 % len(kinds)] if n % 2 else None
        there = served(folder, server.url, retries=20)
        run = distill(tiny.tiny_student(), there, tiny.prompts(), RECIPE)
        faulty = weights(run.student)
        assert server.scored > 30
    assert_equal(whole, faulty)
    assert sum(step["teacher_retries"] for step in run.steps) == there.retries == server.scored - 18
    assert all(step["teacher_tokens_per_s"] > 0 for step in run.steps)
    assert " retries" in step_summary(run.steps[0])
    start = weights(tiny.tiny_student())
    assert any(not torch.equal(start[name], whole[name]) for name in start)


@pytest.mark.slow
def test_a_run_waits_for_a_server_that_refuses_connections(teacher: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher) as server:
        whole = trained(served(folder, server.url))
        url, port = server.url, server.port
    there = served(folder, url, retries=20, first_wait_s=0.05)
    opened: list[ModelServer] = []

    def open_late() -> None:
        while not there.retries:
            time.sleep(0.01)
        opened.append(ModelServer(teacher, port=port).__enter__())

    late = threading.Thread(target=open_late)
    late.start()
    try:
        assert_equal(whole, trained(there))
    finally:
        late.join()
        opened[0].__exit__(None, None, None)


def test_a_fault_that_stays_ends_a_run_in_one_line_with_what_it_had_learned(
    teacher: LanguageModel, folder: Path
) -> None:
    kept = []
    for fault in ("500", "NaN", "oversized", "redirect"):  # one of each kind
        student, recipe = tiny.tiny_student(), RECIPE.replace(steps=2)
        with ModelServer(teacher, faults=lambda n, fault=fault: fault if n >= 6 else None) as server:
            there = served(folder, server.url, retries=0)
            with pytest.raises(TeacherError, match=r"^after step 1: server http") as error:
                distill(student, there, tiny.prompts(), recipe)
        assert "\n" not in str(error.value)
        kept.append(weights(student))
    for each in kept:
        assert_equal(kept[0], each)


def test_a_run_with_every_token_known_is_the_run_with_the_model_itself(
    teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        there = trained(served(folder, server.url, top_k=teacher.vocabulary.size))
    here = trained(LocalTeacher(tiny.tiny_teacher()))
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=0, atol=3e-4)


def test_an_objective_that_needs_more_is_refused(student: LanguageModel, folder: Path) -> None:
    there = served(folder, "http://127.0.0.1:1/v1", top_k=0)
    with pytest.raises(TeacherError, match="reverse_kl needs the likeliest tokens of each row"):
        distill(student, there, tiny.prompts(), Recipe((Term("reverse_kl"),)))
    there = served(folder, "http://127.0.0.1:1/v1", top_k=5)
    with pytest.raises(TeacherError, match="uld needs full rows"):
        distill(student, there, tiny.prompts(), Recipe((Term("uld"),)))


def test_a_prompt_that_it_cannot_read_is_named_before_the_run(
    student: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    prompts = [Prompt("p7", messages=({"role": "user", "content": "1"},))]
    with pytest.raises(DataError, match=r"prompt p7: for teacher tiny at http.*no system prompt"):
        distill(student, served(tmp_path / "t", "http://127.0.0.1:1/v1"), prompts, RECIPE)


LOSSES = {
    "the first evaluation": 1,
    "the first step": 2 + 3,
    "the evaluation of step 2, which no checkpoint would be due after": 6 + 6 + 1,
    "step 4, and the evaluation of step 2 is there": 2 + 6 + 2,
    "the last evaluation": 6 + 1,
}
"""The server's requests until it is gone: 6 of a step, 2 of the evaluations after steps 0, 2 and 4."""


@pytest.mark.slow
def test_a_run_whose_server_goes_away_again_and_again_is_the_run_of_one_that_stays(
    teacher: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    recipe, plan = RECIPE.replace(steps=4), EvaluationPlan(max_new_tokens=10)

    def run(output: Path, resume: bool) -> dict[str, torch.Tensor]:
        saving = Saving(output, resume=resume, evaluate_every=2, checkpoint_every=3)
        there = served(folder, server.url, retries=0)
        done = distill(
            tiny.tiny_student(), there, tiny.prompts(), recipe,
            heldout=tiny.heldout(2), evaluation=plan, saving=saving,
        )  # fmt: skip
        return weights(done.student)

    with ModelServer(teacher) as server:
        whole = run(tmp_path / "whole", resume=False)
        assert server.scored == 3 * 2 + 4 * 6
        steps = []
        for number, requests in enumerate(LOSSES.values()):
            server.scored, server.faults = 0, lambda n, last=requests: "500" if n >= last else None
            with pytest.raises(
                TeacherError, match=r"CUDA error.*; its checkpoint is kept, go on with --resume$"
            ) as lost:
                run(tmp_path / "run", resume=number > 0)
            steps.append(int(str(lost.value).split(":")[0].removeprefix("after step ")))
        assert steps == [0, 0, 2, 3, 4]
        server.faults = lambda n: None
        assert_equal(run(tmp_path / "run", resume=True), whole)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "tokens_per_s"))} for line in lines]


def test_an_evaluation_has_what_a_served_teacher_can_tell(teacher: LanguageModel, folder: Path) -> None:
    plan = EvaluationPlan(max_new_tokens=10)
    with ModelServer(teacher) as server:
        there = evaluate(tiny.tiny_student(), served(folder, server.url), tiny.heldout(4), plan=plan).measures
    here = evaluate(
        tiny.tiny_student(), LocalTeacher(tiny.tiny_teacher()), tiny.heldout(4), plan=plan
    ).measures
    assert "forward_kl_per_byte" in here
    assert "forward_kl_per_byte" not in there
    assert there["reverse_kl_per_byte"] == pytest.approx(here["reverse_kl_per_byte"], abs=1e-4)


def verdicts(checks: list[Any]) -> dict[str, str]:
    return {check.check: check.status for check in checks}


@pytest.mark.parametrize("api", APIS)
def test_a_good_server_passes(api: str, teacher: LanguageModel, student: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=5)
        assert verdicts(examine_server(there, tiny.prompts(5))) == {"server": "pass", "tokenization": "pass"}
        assert examine_noise(there, tiny.prompts(5), student).status == "pass"
        # Without texts of a run, its own.
        assert set(verdicts(examine_server(there)).values()) == {"pass"}


@pytest.mark.parametrize("api", APIS)
def test_another_tokenizer_is_found(
    api: str, teacher: LanguageModel, student: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher, tokenizer=student) as server:
        found = {c.check: c for c in examine_server(served(folder, server.url, api=api), tiny.prompts(5))}
    assert found["tokenization"].status == "fail"
    assert "teacher.path" in found["tokenization"].advice


@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_too_few_log_probabilities_are_found(api: str, teacher: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher, max_logprobs=4) as server:
        (check,) = examine_server(served(folder, server.url, api=api, top_k=5), tiny.prompts(5))
        assert examine_server(served(folder, server.url, api=api, top_k=4))[0].status == "pass"
    assert check.status == "fail"
    assert "greater than max allowed: 4" in check.found
    assert {"vllm": "--max-logprobs", "openai": "teacher.served.top_k"}[api] in check.advice


def test_the_servers_template_is_compared(teacher: LanguageModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %} ="
    )
    talk = Prompt("a", messages=({"role": "user", "content": "1"},), completion=" 2")
    with ModelServer(teacher) as server:
        there = served(tmp_path / "t", server.url)
        found = []
        for server.template in (None, there.prompt_ids(talk), [5]):
            check = examine_server(there, [talk])[-1]
            found.append((check.check, check.status, check.concerns))
    assert found == [
        ("template", "warn", ("messages",)),
        ("template", "pass", ()),
        ("template", "warn", ("messages",)),
    ]


def test_noise_is_measured(teacher: LanguageModel, student: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher, faults=always("noise")) as server:
        there = served(folder, server.url)
        alone, beside = examine_noise(there, tiny.prompts(5)), examine_noise(there, tiny.prompts(5), student)
        itself = examine_noise(there, tiny.prompts(5), teacher)
    assert (alone.status, beside.status, itself.status) == ("warn", "warn", "fail")
    assert "student and teacher" in beside.found
    assert "let one replica answer" in beside.advice


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_student_is_its_own_served_self(
    api: str, top_k: int, student: LanguageModel, teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=top_k)
        own, talks = examine_own(there, tiny.prompts(5), teacher), [Prompt("a", text="1", completion=" 2")]
        assert own.status == examine_own(there, talks, teacher).status == "pass", own
        # Weights of another model behind the same tokenizer.
        server.model = tiny.tiny_teacher(seed=7)
        other = examine_own(there, tiny.prompts(5), teacher)
        # One that reads every token one place late.
        server.model, server.faults = teacher, always("late")
        late = examine_own(there, tiny.prompts(5), teacher)
    assert (other.status, late.status) == ("fail", "fail")
    assert f"serve the weights of {folder}" in other.advice


def test_a_key_without_encryption_is_warned_of(
    teacher: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gold.doctor.server import _key, _Served

    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    for url, warned in (
        ("http://far.example/v1", 1),
        ("https://far.example/v1", 0),
        ("http://localhost:1/v1", 0),
    ):
        there = served(folder, url, key_env="TEACHER_KEY")
        assert len(_key(_Served(there, [], []))) == warned


class Bench:
    """A configuration with a served teacher, and commands on it."""

    def __init__(
        self, folder: Path, tokenizer: Path, url: str, capfd: pytest.CaptureFixture[str], patch: Any
    ) -> None:
        save_model(tiny.tiny_student(), folder / "student")
        self.folder, self.capfd, self.patch = folder, capfd, patch
        there = {"url": url, "model": "tiny", "top_k": 5, "retries": 0, "key_env": "TEACHER_KEY"}
        teacher = {"path": str(tokenizer), "served": there, "device": "cpu"}
        self.settings = tiny.run_settings(
            folder, folder / "run", teacher=teacher, train__steps=2, train__prompts_per_step=2,
            train__checkpoint_every=9, evaluate__every=9, evaluate__prompts=1,
        )  # fmt: skip

    def gold(self, *words: str) -> tuple[int, str, str]:
        file = tiny.write_settings(self.folder / "run.yaml", self.settings)
        return run_gold(self.patch, self.capfd, words[0], file, *words[1:])


@pytest.fixture
def server(teacher: LanguageModel) -> Iterator[ModelServer]:
    with ModelServer(teacher, key="sk-secret") as made:
        yield made


@pytest.fixture
def bench(
    server: ModelServer,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    monkeypatch.setattr(gold.run, "_draw", lambda *_: None)  # takes seconds
    return Bench(tmp_path, folder, server.url, capfd, monkeypatch)


def test_train_evaluate_and_doctor(bench: Bench, server: ModelServer) -> None:
    code, out, err = bench.gold("doctor")
    assert code == 0, out + err
    assert "tokenization" in out
    assert "noise" in out
    assert "--weights loads the student" in out
    out = bench.gold("doctor", "--weights")[1]
    (memory,) = (line for line in out.splitlines() if "of main memory" in line)
    assert "teacher" not in memory
    assert "student and teacher differ" in out
    assert "  self KL: " in out
    assert "served:" not in out  # another model than the student
    code, out, err = bench.gold("train")
    assert code == 0, err
    server.faults = always("500")
    code, out, err = bench.gold("eval")
    line = err.splitlines()[-1]
    assert code == 1
    assert "answers 500: CUDA error; no usable answer after 1 attempt" in line
    server.faults = lambda n: None
    assert bench.gold("eval")[0] == 0
    for file in (bench.folder / "run").rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes()
    assert yaml.safe_load((bench.folder / "run" / "config.yaml").read_text())["teacher"]["served"]["key_env"]


@pytest.mark.slow
def test_a_run_stops_in_one_line_and_goes_on_at_another_address(
    bench: Bench, server: ModelServer, teacher: LanguageModel
) -> None:
    assert bench.gold("train", f"output={bench.folder / 'whole'}")[0] == 0
    # 13 requests of the probe, 1 of the evaluation, 4 of a step.
    server.faults, server.scored = (lambda n: "500" if n > 13 + 1 + 4 else None), 0
    code, _, err = bench.gold("train")
    (line,) = [line for line in err.splitlines() if not line.startswith("gold: ")]
    assert code == 1
    assert line.startswith("error: after step 1: server http")
    assert line.endswith("its checkpoint is kept, go on with --resume")
    with ModelServer(teacher) as other:
        code, _, err = bench.gold("train", "--resume", f"teacher.served.url={other.url}")
    assert code == 0, err
    one, other_one = (bench.folder / name / "student" / "model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other_one.read_bytes()


def test_another_tokenizer_and_replica_noise_are_named_before_the_first_step(
    server: ModelServer, bench: Bench, student: LanguageModel, teacher: LanguageModel
) -> None:
    server.tokenizer = student.vocabulary
    code, _, err = bench.gold("train")
    assert (code, err.count("\n")) == (1, 1)
    assert "tokenization: the server reads" in err
    server.tokenizer, server.faults = teacher.vocabulary, always("noise")
    code, out, err = bench.gold("train")
    assert code == 0, err
    (line,) = [line for line in (out + err).splitlines() if "noise: " in line]
    assert "answers to the same request" in line


def test_a_student_that_is_served_is_compared_with_itself(
    server: ModelServer, bench: Bench, tmp_path: Path
) -> None:
    """Its folder is named on both sides: what is served must be what is trained."""
    server.model = tiny.tiny_student()
    server.tokenizer = server.model.vocabulary
    bench.settings["teacher"]["path"] = bench.settings["student"]["path"]
    code, out, err = bench.gold("doctor", "--weights")
    assert "pass  self KL, served: " in out, out + err
    server.model = tiny.tiny_student(seed=9)
    code, out, err = bench.gold("doctor", "--weights")
    assert code == 1
    assert "fail  self KL, served: " in out
    code, _, err = bench.gold("train")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "self KL, served: " in line
    assert not (bench.folder / "run").exists()


def test_a_server_that_cannot_serve_the_run_is_refused_before_a_model_is_loaded(
    bench: Bench, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(gold.build, "load_model", load_model)

    def refused(*words: str) -> str:
        code, _, err = bench.gold("train", *words)
        assert (code, err.count("\n")) == (1, 1), err
        return err

    server.max_logprobs = 3
    assert "server: server http://127.0.0.1" in (line := refused())
    assert "--max-logprobs" in line
    assert "does not exist" in refused("teacher.served.model=other")
    assert "needs top_k: it takes teacher.served.top_k above 0" in refused("teacher.served.top_k=0")
    assert "needs rows: it takes a teacher in this process" in refused("objectives.0.name=uld")
    assert "no variable of that name" in refused("teacher.served.key_env=NOT_SET")
    there = bench.settings["teacher"]["served"]
    for key, value in (("key_env", "sk-secret"), ("url", "http://me:sk-secret@b/v1")):
        before, there[key] = there[key], value
        assert f"teacher.served.{key}: " in (line := refused())
        assert "secret" not in line
        there[key] = before
    assert not (bench.folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "teacher.served.key_env=sk-secret",
            "override teacher.served.key_env=…: teacher.served.key_env: expected",
        ),
        ("teacher.served.key_env={sk-secret: 1}", "expected text, got something else"),
        ("teacher.served.key_env=[sk-secret", "override teacher.served.key_env=…: expected ',' or ']'"),
        ("teacher.served.key_env.x=sk-secret", "teacher.served.key_env is something else, which has no keys"),
        ("teacher.served.api_key=sk-secret", "teacher.served.api_key: unknown key"),
        ("teacher.served.url=http://me:sk-secret@h/v1", "user, password, ? and # have no place in it"),
        ("teacher.served=sk-secret", "teacher.served: expected keys and values, got something else"),
        ("teacher={path: t, served: {url: http://h, model: m, key_env: sk-secret}}", "override teacher=…: "),
        ("teacher.served.key_env:sk-secret", "override teacher…: expected section.key=value"),
    ],
)
def test_a_key_typed_into_an_override_is_not_repeated(override: str, line: str, tmp_path: Path) -> None:
    there = {"url": "http://h/v1", "model": "m", "key_env": "sk-secret2"}
    settings = tiny.run_settings(tmp_path, tmp_path / "run", teacher={"path": "t", "served": there})
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    with pytest.raises(ConfigError) as error:
        Config.load(file, [override])
    assert line in str(error.value)
    assert "secret" not in str(error.value)


def test_the_keys_of_a_configuration() -> None:
    text = Config.model_validate(
        {
            "student": {"path": "a"},
            "teacher": {"path": "b", "served": {"url": "http://h/v1", "model": "m"}},
            "data": {"prompts": "c"},
            "output": "d",
        }
    ).to_dict()["teacher"]["served"]
    assert text == {
        "url": "http://h/v1",
        "model": "m",
        "api": "vllm",
        "top_k": 20,
        "concurrency": 8,
        "timeout_s": 60.0,
        "retries": 5,
        "key_env": None,
        "context": None,
    }


def test_a_text_of_probability_0_is_counted_told_of_and_left_out(
    teacher: LanguageModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = (Term("reverse_kl"), Term("span_pg", weight=0.5))
    recipe = ONE_STEP.replace(objectives=objectives)
    with Cutting(teacher) as server:
        lost: list[tuple[int, ...]] = []

        def cut(ids: list[int]) -> bool:
            lost[:] = lost or [tuple(ids)]
            return tuple(ids) in lost

        server.cut = cut
        run = distill(tiny.tiny_student(), served(folder, server.url, top_k=3), tiny.prompts(), recipe)
    (step,) = run.steps
    assert step["teacher_impossible"] == 1
    assert step["applied"]
    assert 0.0 < step["loss"] < 100.0
    told = capsys.readouterr().err
    assert "probability 0" in told
    assert "tiny at http://127.0.0.1" in told
    assert "that of prompt " in told
    assert "token '" in told


def test_where_no_text_is_possible_no_step_is_taken(
    teacher: LanguageModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny.tiny_student()
    before = weights(student)
    with Cutting(teacher) as server:
        server.likeliest = 1
        with pytest.raises(
            TrainingError, match="no text that the teacher finds possible and were not applied"
        ):
            distill(student, served(folder, server.url, top_k=3), tiny.prompts(), ONE_STEP)
        plan = EvaluationPlan(max_new_tokens=6)
        measures = evaluate(student, served(folder, server.url, top_k=3), tiny.heldout(2), plan=plan).measures
    assert "nothing is learned from 4 texts" in capsys.readouterr().err
    assert all(torch.equal(before[name], p) for name, p in weights(student).items())
    assert measures["impossible_share"] == 1.0
    assert "reverse_kl_per_byte" not in measures


def test_an_evaluation_is_over_the_texts_that_are_possible(teacher: LanguageModel, folder: Path) -> None:
    plan = EvaluationPlan(max_new_tokens=6)
    with Cutting(teacher) as server:
        server.cut = lambda ids, first=[]: tuple(ids) in (first or first.append(tuple(ids)) or first)
        measures = evaluate(
            tiny.tiny_student(), served(folder, server.url, top_k=3), tiny.heldout(2), plan=plan
        ).measures
    assert measures["impossible_share"] == 0.5
    assert 0.0 < measures["reverse_kl_per_byte"] < 50.0


def test_a_server_that_cuts_off_what_is_unlikely_is_found(teacher: LanguageModel, folder: Path) -> None:
    with Cutting(teacher) as server:
        there = served(folder, server.url, top_k=6)
        found = {c.check: c for c in examine_server(there, tiny.prompts(2))}["server"]
        assert examine_noise(there, tiny.prompts(2)).status == "pass"
    assert found.status == "fail"
    assert "probability 0" in found.found
    assert "processed_logprobs" in found.advice
