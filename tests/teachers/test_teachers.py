"""Several teachers at once, teachers that are told more, and the student as its own teacher."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trackers import Recorder

import gold.train.state
from gold.build_data import load_data
from gold.config import Config
from gold.data import Prompt, load_prompts
from gold.demo.models import tiny_model, word_tokenizer
from gold.diagnose import diagnose_run
from gold.errors import ConfigError, DataError, TeacherError
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.losses.mixture import Mix, mixed_rows, mixture
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.run import evaluate_source
from gold.run import train as train_as_configured
from gold.teachers import LocalTeacher, SelfTeacher, Teachers
from gold.tokenize.chat import prompt_text
from gold.train.loop import Run, Saving, distill
from gold.train.recipe import Recipe, Term

RECIPE = Recipe(
    steps=3,
    num_generations=2,
    prompts_per_step=4,
    micro_batch_size=4,
    generation_batch_size=8,
    lr=3e-3,
    warmup_steps=1,
    max_new_tokens=8,
)
RULES = ("linear", "log_linear")


def run(teacher: Any, prompts: Sequence[Prompt], student: LanguageModel | None = None, **changes: Any) -> Run:
    options = {name: changes.pop(name) for name in ("heldout", "saving", "verifier") if name in changes}
    recipe = RECIPE.replace(**changes)
    return distill(student or tiny.tiny_student(), teacher, prompts, recipe, progress=Recorder(), **options)


def weights(model: LanguageModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.lm.parameters()])


@pytest.fixture
def gradient(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The gradient of one step over the data's own completions, which depend on no random draw, and its metrics."""

    def of(
        teacher: Any, prompts: Sequence[Prompt], term: Term | None = None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        found: list[torch.Tensor] = []

        def step(self: Any, closure: Any = None) -> None:
            found.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            done = run(
                teacher,
                prompts,
                steps=1,
                on_policy=0.0,
                prompts_per_step=len(prompts),
                max_grad_norm=1e9,
                objectives=(term or Term("forward_kl"),),
            )
        return found[0], done.steps[0]

    return of


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


# Mixtures, as formulas

rows = st.lists(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), min_size=1, max_size=4)


@given(rows, st.data(), st.sampled_from(RULES))
def test_mixtures_are_their_formulas(masses: list[list[float]], data: st.DataObject, rule: Any) -> None:
    q = [[x / sum(row) for x in row] for row in masses]
    w = data.draw(st.lists(st.floats(0.01, 10), min_size=len(q), max_size=len(q)))
    found = mixture([torch.tensor([row], dtype=torch.float64).log() for row in q], w, rule)[0].exp().tolist()
    share = [x / sum(w) for x in w]
    if rule == "linear":
        expected = [sum(s * row[e] for s, row in zip(share, q, strict=True)) for e in range(4)]
    else:
        product = [math.prod(row[e] ** s for s, row in zip(share, q, strict=True)) for e in range(4)]
        expected = [x / sum(product) for x in product]
    assert found == pytest.approx(expected)
    again = mixture([torch.tensor([row], dtype=torch.float64).log() for row in q], [7 * x for x in w], rule)
    assert again[0].exp().tolist() == pytest.approx(found)
    itself = mixture([torch.tensor([q[0]], dtype=torch.float64).log()] * len(q), w, rule)
    assert itself[0].exp().tolist() == pytest.approx(q[0])


def test_what_one_teacher_rules_out_a_log_linear_mixture_rules_out() -> None:
    q, r = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.2, 0.8]]).log()
    assert mixture([q, r], [1, 1], "log_linear").exp().tolist() == [[0.0, 1.0, 0.0]]
    assert mixture([q, r], [1, 1], "linear").exp()[0].tolist() == pytest.approx([0.25, 0.35, 0.4])
    with pytest.raises(ValueError, match="share no event"):
        mixture([q, torch.tensor([[0.0, 0.0, 1.0]]).log()], [1, 1], "log_linear")


def test_rows_of_one_vocabulary_are_mixed_without_rows_of_no_token() -> None:
    logits = [torch.randn(3, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    mixed = mixed_rows([GivenLogits(x) for x in logits], 4, Mix("linear", {"a": 0.25, "b": 0.75}))
    expected = 0.25 * logits[0][:, :4].softmax(-1) + 0.75 * logits[1][:, :4].softmax(-1)
    torch.testing.assert_close(mixed.logits().exp(), expected)
    assert len(mixed.select(torch.tensor([2, 0]))) == 2


# Mixtures, in a step


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_a_mix_of_what_is_one_teacher_is_that_teacher(gradient: Any, rule: Any, kind: str) -> None:
    make = tiny.tiny_teacher if kind == "bytes" else lambda: tiny.tiny_student(seed=8)
    prompts = tiny.prompts(5)
    expected, record = gradient(make(), prompts)
    for members in ({"a": make()}, {"a": make(), "b": make()}):
        found, mixed = gradient(Teachers(members, rule, dict.fromkeys(members, 3.0)), prompts)
        assert_near(found, expected)
        assert mixed[f"forward_kl_{kind}"] == pytest.approx(record[f"forward_kl_{kind}"], rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_in_a_mix_only_ratios_of_weights_count_and_no_order(gradient: Any, rule: Any) -> None:
    a, b = tiny.tiny_teacher(), tiny.tiny_student(seed=8)
    prompts = tiny.prompts(5)
    expected, record = gradient(Teachers({"a": a, "b": b}, rule, {"a": 1, "b": 2}), prompts)
    assert_near(gradient(Teachers({"b": b, "a": a}, rule, {"b": 20, "a": 10}), prompts)[0], expected)
    other, _ = gradient(Teachers({"a": a, "b": b}, rule, {"a": 2, "b": 1}), prompts)
    assert (other - expected).abs().max() > 0.01 * expected.abs().max()
    assert "forward_kl_bytes" in record  # one of the vocabularies is another


def test_objectives_that_a_mix_cannot_serve_are_refused() -> None:
    teachers = Teachers({"a": tiny.tiny_teacher(), "b": tiny.tiny_teacher(3)}, "linear")
    for term in (Term("span_pg"), Term("reverse_kl", support="shared")):
        with pytest.raises(ConfigError, match="cannot be computed for a mix of teachers"):
            run(teachers, tiny.prompts(), objectives=(term,))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"members": {}}, "there is none"),
        ({"weights": {"a": 1, "b": 1}}, "weights need a mix"),
        ({"mix": "linear", "weights": {"a": 1}}, "b: it has no weight"),
        ({"mix": "linear", "weights": {"a": 1, "b": 1, "c": 1}}, "c: no teacher has that name"),
        ({"mix": "linear", "weights": {"a": 0, "b": 0}}, "a: its weight is 0; give a number above 0"),
        ({"mix": "linear", "weights": {"a": math.inf, "b": 1}}, "a: its weight is inf"),
    ],
)
def test_teachers_that_make_no_sense(options: dict[str, Any], line: str) -> None:
    given_ = {"members": {"a": tiny.tiny_teacher(), "b": tiny.tiny_teacher()}} | options
    with pytest.raises(ConfigError, match=line):
        Teachers(**given_)


# Routes


def routed(prompts: Sequence[Prompt], names: str = "ab") -> list[Prompt]:
    return [replace(p, route=names[n % len(names)]) for n, p in enumerate(prompts)]


def test_a_routed_step_is_the_steps_of_each_teachers_prompts(gradient: Any) -> None:
    teachers = {"a": tiny.tiny_teacher(), "b": tiny.tiny_student(seed=8)}
    prompts = routed(tiny.prompts(7))
    whole, record = gradient(Teachers(teachers), prompts)
    parts, sizes = [], []
    for name, teacher in teachers.items():
        mine = [p for p in prompts if p.route == name]
        # On bytes, as beside a teacher of another vocabulary; a mix of one is on them if it must.
        part, alone = gradient(Teachers({name: teacher, "none": tiny.tiny_teacher()}), mine)
        assert record[f"forward_kl_bytes[{name}]"] == pytest.approx(alone["forward_kl_bytes"], rel=1e-4)
        parts.append(part)
        sizes.append(sum(len(str(p.completion)) + 1 for p in mine))  # the stop event counts
    assert_near(whole, sum(s * g for s, g in zip(sizes, parts, strict=True)) / sum(sizes))
    mean = sum(s * record[f"forward_kl_bytes[{n}]"] for s, n in zip(sizes, teachers, strict=True)) / sum(
        sizes
    )
    assert record["forward_kl_bytes"] == pytest.approx(mean, rel=1e-4)


def test_each_teacher_reads_its_own_prompts_alone() -> None:
    read: dict[str, set[str]] = {"a": set(), "b": set()}

    class Watched(LocalTeacher):
        def score(self, prompts: Any, tokenized_texts: Any, stopped: Any) -> list[LazyLogits]:
            read[self.label] |= {p.key for p in prompts}
            return super().score(prompts, tokenized_texts, stopped)

    teachers = {"a": Watched(tiny.tiny_teacher()), "b": Watched(tiny.tiny_teacher(3))}
    for name, teacher in teachers.items():
        teacher.label = name  # type: ignore[attr-defined]
    prompts, heldout = routed(tiny.prompts(12)), routed(tiny.heldout(4))
    done = run(Teachers(teachers), prompts, heldout=heldout, verifier=tiny.TASK)
    for name in teachers:
        assert read[name] == {p.key for p in [*prompts, *heldout] if p.route == name}
    measures = done.evaluations[-1]
    for measure in ("reverse_kl_per_byte", "forward_kl_per_byte", "accuracy"):
        ends = sorted(measures[f"{measure}[{name}]"] for name in teachers)
        assert ends[0] <= measures[measure] <= ends[1]


def test_a_route_to_nobody_is_refused_before_the_first_step() -> None:
    teachers = Teachers({"math": tiny.tiny_teacher(), "code": tiny.tiny_teacher()})
    with pytest.raises(DataError, match=r'its route is "maths".*did you mean math'):
        run(teachers, routed(tiny.prompts(4), names=["maths"]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="it names no teacher"):
        run(teachers, tiny.prompts(4))


# What teachers alone are told

contents = st.text("abc <>\n", min_size=1, max_size=5).filter(str.strip)
turns = st.lists(
    st.builds(dict, role=st.sampled_from(["system", "user", "assistant", "tool"]), content=contents),
    min_size=1,
    max_size=4,
)


@given(turns.filter(lambda t: t[-1]["role"] != "assistant"), contents | turns)
def test_a_context_adds_to_messages_and_takes_nothing(messages: Any, context: Any) -> None:
    told = tuple(context) if isinstance(context, list) else context
    prompt = Prompt("k", messages=tuple(messages), teacher_context=told)
    before = copy.deepcopy(prompt.messages)
    found = prompt.for_teacher
    assert prompt.messages == before
    assert (found.key, found.teacher_context) == ("k", None)
    said = "\n".join(m["content"] for m in found.messages or ())
    for text in [context] if isinstance(context, str) else [m["content"] for m in context]:
        assert text in said
    assert [m["role"] for m in found.messages or ()][-1] == messages[-1]["role"]
    ends = [m["content"] for m in found.messages or ()][-len(messages) :]
    if isinstance(context, list) and messages[0]["role"] != "system":
        assert ends == [m["content"] for m in messages]


def turn(text: str) -> dict[str, str]:
    role, _, content = text.partition(": ")
    return {"role": {"s": "system", "u": "user", "a": "assistant"}[role], "content": content}


@pytest.mark.parametrize(
    ("messages", "context", "expected"),
    [
        (["u: Q"], "hint", ["u: hint\n\nQ"]),
        (["s: S", "u: P", "a: A", "u: Q"], "hint", ["s: S", "u: P", "a: A", "u: hint\n\nQ"]),
        (["s: S", "u: Q"], ["u: eg", "a: so"], ["s: S", "u: eg", "a: so", "u: Q"]),
        (["s: S", "u: Q"], ["s: T"], ["s: S\n\nT", "u: Q"]),
        (["u: Q"], ["s: T"], ["s: T", "u: Q"]),
    ],
)
def test_where_a_context_stands(messages: list[str], context: Any, expected: list[str]) -> None:
    told = context if isinstance(context, str) else tuple(map(turn, context))
    prompt = Prompt("k", messages=tuple(map(turn, messages)), teacher_context=told)
    assert prompt.for_teacher.messages == tuple(map(turn, expected))
    assert Prompt("k", text=" 1 =", teacher_context=" 2 =").for_teacher.text == " 2 = 1 ="


def told(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, teacher_context=f"{p.reference} =") for p in prompts]


def test_the_student_never_reads_what_teachers_are_told() -> None:
    plain, heldout = tiny.prompts(12), tiny.heldout(4)
    seen: list[str] = []

    class Deaf(LocalTeacher):
        """Reads the context, and grades as if it had not."""

        def score(self, prompts: Any, tokenized_texts: Any, stopped: Any) -> list[LazyLogits]:
            seen.extend(prompt_text(p) for p in prompts)
            asked = [replace(p, text=str(p.text).removeprefix(f"{p.reference} =")) for p in prompts]
            return super().score(asked, tokenized_texts, stopped)

    done = run(Deaf(tiny.tiny_teacher()), told(plain), heldout=told(heldout), verifier=tiny.TASK, steps=2)
    assert set(seen) <= {f"{p.reference} ={p.text}" for p in [*plain, *heldout]}
    expected = run(LocalTeacher(tiny.tiny_teacher()), plain, heldout=heldout, verifier=tiny.TASK, steps=2)
    assert torch.equal(weights(done.student), weights(expected.student))
    for one, other in zip(done.evaluations, expected.evaluations, strict=True):
        for measure in ("reverse_kl_per_byte", "accuracy", "score", "length_bytes"):
            assert one[measure] == other[measure]
    # A teacher that listens grades otherwise.
    heard = run(LocalTeacher(tiny.tiny_teacher()), told(plain), steps=2)
    assert not torch.equal(weights(heard.student), weights(expected.student))


def test_a_context_that_leaves_a_teacher_no_room_is_named_before_the_run() -> None:
    teacher = tiny.tiny_teacher()
    prompts = [replace(tiny.prompts(1)[0], teacher_context=" 1" * 100)]
    with pytest.raises(DataError, match=r"do not fit the 128 tokens of model teacher"):
        run(teacher, prompts)


# The student as its own teacher


def test_a_frozen_self_stays_and_decay_zero_is_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = (Term("reverse_kl"), Term("sft"))
    losses = {}
    for decay in (1.0, 0.0):
        student = tiny.tiny_student()
        teacher, start = SelfTeacher(student, decay), weights(student).clone()
        done = run(
            teacher, tiny.prompts(), student, objectives=terms, on_policy=0.5, steps=4, lr=1e-2, seed=2
        )
        assert not torch.equal(weights(student), start)
        assert torch.equal(weights(teacher.model), start if decay else weights(student))
        losses[decay] = [record["reverse_kl_tokens"] for record in done.steps]
    assert losses[0.0] == pytest.approx([0.0] * 4, abs=1e-6)
    assert losses[1.0][0] == pytest.approx(0.0, abs=1e-6)
    assert losses[1.0][-1] > 1e-4


def test_an_average_follows_by_its_formula() -> None:
    student = tiny.tiny_student()
    teacher, expected = SelfTeacher(student, 0.7), weights(student).double()
    states: list[torch.Tensor] = []

    seen = Recorder(lambda _: states.append(weights(student).double()))
    distill(student, teacher, told(tiny.prompts()), RECIPE.replace(steps=4), progress=seen)
    for state in states:
        expected = 0.7 * expected + 0.3 * state
    torch.testing.assert_close(weights(teacher.model).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"expected 0 to 1, got 1\.5"):
        SelfTeacher(student, 1.5)


def test_weights_of_16_bits_are_averaged_in_32() -> None:
    student = tiny.tiny_student()
    student.lm.bfloat16()
    assert weights(SelfTeacher(student, 0.9).model).dtype == torch.float32
    assert weights(student).dtype == torch.bfloat16


def test_frozen_weights_and_a_leash_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny.tiny_student()
    teacher = SelfTeacher(student)
    monkeypatch.setattr(gold.train.state, "copy_of", lambda lm: pytest.fail("a second copy"))
    terms = (Term("reverse_kl"), Term("reference_kl", weight=0.1))
    done = run(teacher, told(tiny.prompts()), student, objectives=terms, steps=1)
    assert done.steps[0]["reference_kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_run_with_an_average_that_broke_off_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    class Flaky(LocalTeacher):
        asked = 0

        def score(self, *given_: Any) -> list[LazyLogits]:
            self.asked += 1
            if self.asked == self.fails:
                raise TeacherError("gone")
            return super().score(*given_)

    def go(output: Path, fails: int, resume: bool) -> Run:
        student = tiny.tiny_student()
        other = Flaky(tiny.tiny_teacher())
        other.fails = fails  # type: ignore[attr-defined]
        teachers = Teachers({"a": other, "b": SelfTeacher(student, 0.6)})
        saving = Saving(output, resume, checkpoint_every=100)
        return run(teachers, told(routed(tiny.prompts())), student, steps=4, saving=saving)

    whole = go(tmp_path / "whole", 0, False)
    with pytest.raises(TeacherError, match="gone; its checkpoint is kept"):
        go(tmp_path / "run", 3, False)
    resumed = go(tmp_path / "run", 0, True)
    assert torch.equal(weights(resumed.student), weights(whole.student))
    files = [tmp_path / name / "checkpoints/step-000004/teacher-b.pt" for name in ("run", "whole")]
    one, other = (torch.load(f, weights_only=True) for f in files)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], whole.student.lm.state_dict()[name]) for name in one)


# The documentation

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^<!-- tested -->\n```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_pages_configurations_are_some(tmp_path: Path) -> None:
    found = []
    for block in blocks("yaml"):
        (tmp_path / "run.yaml").write_text(block)
        found.append(Config.load(tmp_path / "run.yaml"))
    assert [(c.route, c.mix, list(c.named_teachers)) for c in found] == [
        ("subject", None, ["sums", "words"]),
        (None, "linear", ["first", "second"]),
        (None, None, ["teacher"]),
        (None, None, ["teacher"]),
    ]
    assert found[-1].student.template_kwargs == {"enable_thinking": False}


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_pair(Path("models"))
    other = tiny_model(word_tokenizer(tiny.texts(), 60), "other", layers=1, width=32, seed=4)
    save_model(other, Path("models/other"))
    for model in (Path("models") / name / "config.json" for name in ("student", "teacher", "other")):
        config = json.loads(model.read_text())
        model.write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    lines = [
        {"prompt": p.text, "reference": p.reference, "subject": s}
        for p, s in zip(tiny.prompts(8), ["sums", "words"] * 4, strict=True)
    ]
    write(Path("prompts.jsonl"), *lines)
    namespace: dict[str, Any] = {}
    labels = []
    for block in blocks("python"):
        exec(compile(block.replace("steps=200", "steps=1"), str(PAGE), "exec"), namespace)
        (record,) = namespace["run"].steps
        assert record["applied"]
        labels.append(set(record))
    assert {"reverse_kl_bytes[sums]", "reverse_kl_bytes[words]"} <= labels[0]
    assert {"sampled_reverse_kl_per_byte[sums]", "sampled_reverse_kl_per_byte[words]"} <= labels[1]
    assert "reverse_kl_tokens" in labels[2]


# Configurations


def settings(**changes: Any) -> dict[str, Any]:
    plain = {"student": {"path": "s"}, "data": {"prompts": "p.jsonl"}, "output": "o"}
    return plain | changes


TWO = {"math": {"path": "m"}, "code": {"path": "c"}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teachers": TWO}, "teachers: a route .* give one of the two, neither is given"),
        ({"teachers": TWO, "route": "f", "mix": "linear"}, "both are given"),
        ({"teachers": TWO, "route": "f", "teacher": {"path": "t"}}, "teachers: teacher is given too"),
        ({"teacher": {"path": "t"}, "route": "f"}, "route: there is one teacher"),
        ({"teacher": {"path": "t"}, "mix": "linear"}, "mix: there is one teacher"),
        ({"teachers": TWO, "route": "prompt"}, "route: prompt has another meaning"),
        ({"teachers": TWO, "mix": "average"}, "mix: expected linear | log_linear, got"),
        ({"teachers": {**TWO, "a b": {"path": "x"}}, "route": "f"}, "teachers.a b: a name has letters"),
        ({"teachers": {**TWO, "c": {"path": "x", "weight": 0}}, "mix": "linear"}, "weight: must be > 0, got 0"),
        ({"teachers": {**TWO, "c": {"path": "x", "weight": 2}}, "route": "f"}, "teachers.c.weight: belongs to a mix"),
        ({"teachers": {"a": {}}, "route": "f"}, "teachers.a.path: is missing"),
        ({"teachers": {"a": {"pth": "x"}}}, "teachers.a.pth: unknown key; did you mean path"),
        ({"teacher": {"self": "fixed"}}, "teacher.self: expected frozen | ema"),
        ({"teacher": {"self": "ema", "decay": 2}}, "teacher.decay: must be <= 1"),
        ({"teacher": {"self": "ema", "path": "t"}}, "teacher: path is of another model"),
        ({"teachers": TWO, "mix": "linear", "objectives": [{"name": "span_pg"}]}, "mix: span_pg cannot be computed"),
        (
            {"teachers": TWO, "mix": "linear", "objectives": [{"name": "jsd", "support": "prefix"}]},
            "mix: jsd on prefix cannot be computed for a mix",
        ),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.model_validate(settings(**changes))
    assert re.search(line.replace("|", r"\|"), str(caught.value)), str(caught.value)


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_data_that_does_not_fit_the_teachers(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    data = {"prompts": str(file), "heldout": str(file)}
    config = Config.model_validate(settings(teachers=TWO, route="topic", data=data))
    for line, error in (
        ({}, 'p.jsonl:2: "topic", which names the teacher, is null or missing'),
        ({"topic": 3}, 'p.jsonl:2: "topic", which names the teacher, is a number'),
        ({"topic": "Math"}, 'its route is "Math", and no teacher has that name; did you mean math'),
        ({"topic": "math"}, "teachers.code: no training prompt has this name as its topic"),
        ({"topic": "math", "teacher_context": 3}, '"teacher_context" is a number'),
        ({"topic": "math", "teacher_context": ""}, '"teacher_context" is empty'),
        (
            {"topic": "math", "teacher_context": [turn("u: x")]},
            "the prompt is a plain text; give it as a string",
        ),
        (
            {
                "topic": "math",
                "prompt": None,
                "messages": [turn("u: b")],
                "teacher_context": [{"role": "user"}],
            },
            r'"content" of teacher_context\[0\] is null or missing',
        ),
    ):
        write(file, {"prompt": "a", "topic": "math"}, {"prompt": "b", **line})
        with pytest.raises((DataError, ConfigError), match=error):
            load_data(config)
    alone = Config.model_validate(settings(teacher={"self": "frozen"}, data=data))
    write(file, {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(ConfigError, match="would learn from itself what it knows already"):
        load_data(alone)
    write(
        file,
        {"prompt": "a", "teacher_context": "hint"},
        {"messages": [turn("u: b")], "teacher_context": [turn("s: c")]},
    )
    first, second = load_prompts(file)
    assert (first.for_teacher.text, [m["role"] for m in second.for_teacher.messages or ()]) == (
        "hinta",
        ["system", "user"],
    )


def test_a_run_from_a_file_with_several_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gold.doctor.memory_table._SHOWN", 0)  # also of models as small as these
    tiny.save_pair(tmp_path)
    lines = [
        {"prompt": p.text, "id": p.key, "topic": name, "teacher_context": f"{p.reference} ="}
        for p, name in zip(tiny.prompts(16), ["sums", "own"] * 8, strict=True)
    ]
    file = write(tmp_path / "p.jsonl", *lines)
    tree = tiny.run_settings(tmp_path, tmp_path / "run", train__steps=2, evaluate__every=2)
    del tree["teacher"]
    tree |= {
        "data": {"prompts": str(file), "heldout": str(file)},
        "teachers": {"sums": {"path": str(tmp_path / "teacher")}, "own": {"self": "ema", "decay": 0.5}},
        "route": "topic",
    }
    path = tiny.write_settings(tmp_path / "run.yaml", tree)
    report = diagnose_run(path)
    of = {check.check.split(": ")[0]: check for check in report.checks}
    assert of.keys() == {"sums", "own", "memory", "context", "prompts"}
    assert "teacher own" in of["context"].found
    assert "teacher" in of["memory"].found
    assert report.verdict != "fail"
    seen = Recorder()
    done = train_as_configured(Config.load(path), progress=seen)
    header = seen.run.header
    assert "itself, averaged, decay 0.5" in header["teacher own"]
    assert header["teachers"] == "each prompt has its own"
    assert done.steps[-1]["applied"]
    again = evaluate_source(tmp_path / "run", ["evaluate.branches=0"]).measures
    for measure, value in again.items():
        assert value == pytest.approx(done.evaluations[-1][measure], rel=1e-4, abs=1e-5), measure
