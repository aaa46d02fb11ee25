"""A teacher behind a cache: asked once, the same numbers ever after, and in the end not needed at all."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import Ended, run_gold
from support.server import ModelServer
from support.tokenizers import with_added
from tokenizers import Tokenizer, decoders, models, normalizers

import gold.run
from gold import CachedTeacher, LocalTeacher, Prompt, Recipe, ServedTeacher, TeacherError, Term
from gold.cache.codes import _HEAD, Scores, encode
from gold.cache.store import ScoreCache
from gold.demo.models import SPECIAL, _with_bos, tiny_model
from gold.errors import ConfigError
from gold.evaluate import EvaluationPlan, evaluate
from gold.kernels.logits import GivenLogits, LazyLogits, likeliest
from gold.models.language_model import LanguageModel
from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import record
from gold.train.loop import Saving, distill

RECIPE = Recipe(
    (Term("forward_kl"), Term("span_pg", weight=0.5)),
    max_new_tokens=10,
    steps=3,
    prompts_per_step=3,
    num_generations=2,
    lr=3e-3,
    warmup_steps=1,
)
OFF_POLICY = RECIPE.replace(objectives=(Term("forward_kl"),), on_policy=0.0, max_new_tokens=60)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny.tiny_teacher())


@pytest.fixture(scope="module")
def files(teacher: LocalTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer, and nothing else of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    teacher.model.tokenizer.save_pretrained(path)
    return path


def sentencepiece_student(seed: int = 4) -> LanguageModel:
    """Random weights; another family: ▁ is a space, words are cut in pieces, unknown characters are bytes."""
    pieces = [*"0123456789+-=", "▁", "▁+", "▁-", "▁=", "10", "20", "▁1", "▁2"]
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [("▁", "+"), ("▁", "-"), ("▁", "="), ("▁", "1"), ("▁", "2"), ("1", "0"), ("2", "0")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tiny_model(_with_bos(tokenizer), "student", layers=2, width=32, seed=seed)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.lm.named_parameters()}


def trained(teacher: Any, recipe: Recipe = RECIPE, **options: Any) -> dict[str, torch.Tensor]:
    return weights(distill(tiny.tiny_student(), teacher, tiny.prompts(), recipe, **options).student)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def asking(teacher: LocalTeacher, count: int = 3) -> tuple[list[Prompt], list[Any], list[bool]]:
    """Texts to be scored: prompts, the teacher's spelling of what comes after them, and whether they end."""
    prompts = tiny.prompts(count)
    spelled = [teacher.vocabulary.encode(p.completion or "") for p in prompts]
    return prompts, spelled, [bool(n % 2) for n in range(count)]


# What is known of a row


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.booleans())
def test_the_likeliest_tokens_of_a_row_and_the_rest(seed: int, top_k: int, gaps: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(4, 9)) * 3)
    if gaps:
        logits[torch.from_numpy(rng.random((4, 9)) < 0.4)] = -torch.inf
        logits[:, 3] = 1.0
    also = torch.from_numpy(rng.integers(-1, 9, (4, 3)))
    size = int(rng.integers(4, 10))
    ids, logp, rest = likeliest(GivenLogits(logits), top_k, also, size)
    expected = torch.log_softmax(logits, -1)
    for n in range(4):
        known = [int(i) for i in ids[n] if i >= 0]
        first = list(dict.fromkeys(int(i) for i in also[n] if i >= 0))
        best = sorted(range(size), key=lambda i: -float(logits[n, i]))[:top_k]
        best = [i for i in best if torch.isfinite(logits[n, i])]
        assert known == [*first, *(i for i in best if i not in first)]
        torch.testing.assert_close(logp[n][ids[n] >= 0], expected[n, known], rtol=1e-12, atol=1e-12)
        others = [i for i in range(9) if i not in known]
        torch.testing.assert_close(rest[n], torch.logsumexp(expected[n, others], 0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_k", [0, 1, 4, 17])
def test_its_rows_are_the_teachers_own_within_the_stated_bound(
    top_k: int, teacher: LocalTeacher, tmp_path: Path
) -> None:
    cached = CachedTeacher(teacher, tmp_path, top_k=top_k)
    assert cached.gives == ("top_k" if top_k else "tokens")
    asked = asking(teacher)
    stops = list(teacher.vocabulary.stop_ids)
    for whole, kept, tokenized, stop in zip(
        teacher.score(*asked), cached.score(*asked), *asked[1:], strict=True
    ):
        size = whole.width
        exact = torch.log_softmax(whole.logits().double(), -1)
        back = kept.logits()
        assert (kept.partial, len(kept)) == (True, len(tokenized.ids) + stop)
        known = torch.isfinite(back[:, :size])
        least = torch.zeros_like(known)
        least.scatter_(1, exact.topk(top_k).indices, True)
        least[:, stops] = True
        least[torch.arange(len(tokenized.ids)), tokenized.ids.astype(np.int64)] = True
        assert torch.equal(known, least)
        assert (torch.abs(back[:, :size] - exact)[known] <= 7.1e-5 * (5.0 - exact[known])).all()
        torch.testing.assert_close(back.exp().sum(-1), torch.ones(len(back), dtype=torch.float64))
    assert ScoreCache.open(tmp_path).rows == sum(len(rows) for rows in teacher.score(*asked))


def test_what_is_found_is_what_was_asked_for_bit_by_bit(teacher: LocalTeacher, tmp_path: Path) -> None:
    first = CachedTeacher(teacher, tmp_path, top_k=4)
    asked = asking(teacher)
    one = first.score(*asked)
    again = first.score(*asked)
    first.cache.close()
    later = CachedTeacher(teacher, tmp_path)
    other = later.score(*asked)
    for rows in zip(one, again, other, strict=True):
        assert torch.equal(rows[0].logits(), rows[1].logits())
        assert torch.equal(rows[0].logits(), rows[2].logits())
    assert (first.asked, first.found, later.asked, later.found) == (3, 3, 0, 3)
    assert later.cache.origin.top_k == 4


def test_a_text_that_comes_twice_is_asked_for_once(teacher: LocalTeacher, tmp_path: Path) -> None:
    cached = CachedTeacher(teacher, tmp_path)
    prompts, spelled, stopped = asking(teacher, 2)
    rows = cached.score([*prompts, *prompts], [*spelled, *spelled], [*stopped, *stopped])
    assert (cached.asked, cached.found, len(cached.cache)) == (2, 2, 2)
    assert torch.equal(rows[1].logits(), rows[3].logits())
    # Another end, and another prompt, is another text.
    cached.score(prompts, spelled, [not stop for stop in stopped])
    cached.score([replace(p, text=f"{p.text} ") for p in prompts], spelled, stopped)
    assert cached.asked == 6
    # A key that people gave to a prompt is not what it says.
    cached.score([replace(p, key=f"{p.key}b") for p in prompts], spelled, stopped)
    assert cached.asked == 6


def test_texts_without_tokens(teacher: LocalTeacher, tmp_path: Path) -> None:
    empty = teacher.vocabulary.encode("")
    cached = CachedTeacher(teacher, tmp_path)
    rows = cached.score([Prompt("a", text="1"), Prompt("b", text="2")], [empty, empty], [False, True])
    assert [len(each) for each in rows] == [0, 1]
    assert len(LazyLogits.joined(rows)) == 1


def test_a_damaged_text_is_asked_for_again(
    teacher: LocalTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asking(teacher)
    with CachedTeacher(teacher, tmp_path).cache as cache:
        before = CachedTeacher.score(self := CachedTeacher(teacher, tmp_path), *asked)
        self.cache.close()
        assert not len(cache)
    shard = tmp_path / "000000.scores"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    cached = CachedTeacher(teacher, tmp_path)
    after = cached.score(*asked)
    assert "counts as not there" in caplog.text
    assert (cached.asked, cached.found) == (1, 2)
    assert all(torch.equal(a.logits(), b.logits()) for a, b in zip(before, after, strict=True))


def test_a_teacher_that_gives_nan_is_named_and_nothing_is_kept(tmp_path: Path) -> None:
    broken = LocalTeacher(tiny.tiny_teacher())
    with torch.no_grad():
        broken.model.lm.get_output_embeddings().weight.fill_(torch.nan)
    cached = CachedTeacher(broken, tmp_path / "c")
    with pytest.raises(
        TeacherError, match=r"prompt .* =: teacher teacher: the probabilities of row 0 add up to nan"
    ):
        cached.score(*asking(broken))
    assert not (tmp_path / "c").exists()


def _scores(ids: list[list[int]], logp: list[list[float]], rest: float = -np.inf) -> bytes:
    known = np.array(logp, np.float64)
    return encode(Scores(np.array(ids, np.int64), known, np.full(len(ids), rest)))


HALF = math.log(0.5)
KEPT = {
    "nothing": b"",
    "its head alone": _HEAD.pack(2, 2, 3),
    "a row too few": _scores([[5, 6]], [[HALF, HALF]]),
    "a row too many": _scores([[5, 6]] * 3, [[HALF, HALF]] * 3),
    "more tokens than there can be": _scores([list(range(9))] * 2, [[math.log(1 / 9)] * 9] * 2),
    "a token id beyond the vocabulary": _scores([[5, 999]] * 2, [[HALF, HALF]] * 2),
    "a token twice": _scores([[5, 5]] * 2, [[HALF, HALF]] * 2),
    "no distribution": _HEAD.pack(2, 2, 3)
    + np.array([1, 1, 65535, 65535, 30000, 30000], "<u2").tobytes()
    + b"\0",
    "rows of 60,000 places": _HEAD.pack(60_000, 60_000, 1)
    + np.array([60_000] + [0] * 59_999 + [0] * 120_000, "<u2").tobytes()
    + b"\0" * 7500,
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_text_that_is_not_kept_as_it_must_be_is_one_line(
    kind: str, teacher: LocalTeacher, tmp_path: Path
) -> None:
    """Its checksum is right all the same."""
    text, prompt = teacher.vocabulary.encode("1"), Prompt("a", text="1")
    asked = [prompt], [text], [True]
    with CachedTeacher(teacher, tmp_path, top_k=3).cache as cache:
        cache.add([(cache.origin.key(teacher.prompt_ids(prompt), text.ids.tolist(), True), 2, KEPT[kind])])
    with pytest.raises(TeacherError, match=r"^cache .*: the scores of a text are broken \(.*build") as error:
        CachedTeacher(teacher, tmp_path, top_k=3).score(*asked)
    assert "\n" not in str(error.value)


# Training


def served(files: Path, url: str, **options: Any) -> ServedTeacher:
    return ServedTeacher(
        files, url=url, model="tiny", **{"retries": 0, "timeout_s": 20.0, "top_k": 5} | options
    )


def test_a_repeated_run_asks_nothing_and_ends_with_the_same_weights(
    teacher: LocalTeacher, files: Path, tmp_path: Path
) -> None:
    plan = {"heldout": tiny.heldout(2), "evaluation": EvaluationPlan(max_new_tokens=10)}
    with ModelServer(teacher.model) as server:
        plain = trained(served(files, server.url))
        server.scored = 0
        first = trained(CachedTeacher(served(files, server.url), tmp_path / "c"), **plan)
        assert server.scored <= 3 * 6 + 2 * 2
    gone = trained(CachedTeacher(served(files, server.url), tmp_path / "c"), **plan)
    assert same(first, gone)
    for name in plain:  # what is kept is what was said, but for its last digits
        torch.testing.assert_close(first[name], plain[name], rtol=0, atol=5e-4)
    assert any(not torch.equal(plain[name], weights(tiny.tiny_student())[name]) for name in plain)


@pytest.mark.slow
def test_a_run_that_lost_its_server_asks_only_for_what_is_missing(
    teacher: LocalTeacher, files: Path, tmp_path: Path
) -> None:
    with ModelServer(teacher.model) as server:
        whole = trained(CachedTeacher(served(files, server.url), tmp_path / "whole"))
        requests, server.scored = server.scored, 0
        server.faults = lambda n: "500" if n >= 9 else None
        saving = Saving(tmp_path / "run")
        with pytest.raises(TeacherError, match=r"after step 1: .*CUDA error"):
            trained(CachedTeacher(served(files, server.url, concurrency=1), tmp_path / "c"), saving=saving)
        server.faults, server.scored = lambda n: None, 0
        again = CachedTeacher(served(files, server.url), tmp_path / "c")
        assert same(trained(again, saving=replace(saving, resume=True)), whole)
        # The first step was whole, the second was not, and is asked for as a whole.
        assert server.scored == requests - 6


@pytest.mark.slow
def test_one_cache_teaches_students_of_two_families_without_the_teacher(
    teacher: LocalTeacher, files: Path, tmp_path: Path
) -> None:
    # What the teacher alone is told is part of what it read.
    prompts = [
        replace(p, teacher_context="12 +3 = 15" if n % 2 else None) for n, p in enumerate(tiny.prompts(12))
    ]
    record(builder := CachedTeacher(teacher, tmp_path / "c"), prompts)
    builder.cache.close()
    recipe = OFF_POLICY.replace(steps=8, prompts_per_step=6)
    for make in (tiny.tiny_student, sentencepiece_student):
        alone = CachedTeacher(AbsentTeacher(files), tmp_path / "c")
        run = distill(make(), alone, prompts, recipe)
        losses = [step["forward_kl_bytes"] for step in run.steps]
        assert losses[-1] < 0.8 * losses[0], losses
        assert (alone.asked, alone.found) == (0, 48)
        beside = distill(make(), CachedTeacher(teacher, tmp_path / "c"), prompts, recipe)
        assert same(weights(run.student), weights(beside.student))
    assert make().vocabulary.family != tiny.tiny_student().vocabulary.family


def test_what_is_missing_is_counted_before_anything_is_trained(
    teacher: LocalTeacher, files: Path, tmp_path: Path
) -> None:
    prompts = tiny.prompts(12)
    record(CachedTeacher(teacher, tmp_path / "c"), prompts[:5])
    alone = CachedTeacher(AbsentTeacher(files), tmp_path / "c")
    recipe = OFF_POLICY.replace(steps=4)
    line = r"cache .*: lacks 7 of 12 texts, that of prompt .* = for one, and no teacher can be asked; gold cache build"
    with pytest.raises(TeacherError, match=line):
        distill(tiny.tiny_student(), alone, prompts, recipe, saving=Saving(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    # Only what the steps will read is asked for.
    with pytest.raises(TeacherError, match=r"lacks \d of 6 texts"):
        distill(tiny.tiny_student(), alone, prompts, recipe.replace(steps=2))
    # Without an objective that needs the teacher there is nothing to miss.
    distill(tiny.tiny_student(), alone, prompts, recipe.replace(objectives=(Term("sft"),)))
    # What the student writes is in no cache.
    with pytest.raises(TeacherError, match=r"lacks \d of 6 texts"):
        distill(tiny.tiny_student(), alone, prompts, RECIPE)


def test_an_evaluation_leaves_out_what_nobody_can_be_asked(
    teacher: LocalTeacher, files: Path, tmp_path: Path
) -> None:
    record(CachedTeacher(teacher, tmp_path / "c"), tiny.prompts(2))
    plan = EvaluationPlan(max_new_tokens=10)
    alone = CachedTeacher(AbsentTeacher(files), tmp_path / "c")
    found = evaluate(tiny.tiny_student(), alone, tiny.heldout(2), plan=plan).measures
    assert found == evaluate(tiny.tiny_student(), None, tiny.heldout(2), plan=plan).measures


def test_an_objective_that_needs_more_is_refused(teacher: LocalTeacher, tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"uld needs full rows of a teacher, and teacher teacher in cache .* gives top_k"
    ):
        trained(CachedTeacher(teacher, tmp_path), Recipe((Term("uld"),)))
    with pytest.raises(TeacherError, match="forward_kl needs the likeliest tokens"):
        trained(CachedTeacher(teacher, tmp_path, top_k=0), Recipe((Term("forward_kl"),)))


# Whose cache it is


def test_other_weights_are_another_teacher(teacher: LocalTeacher, files: Path, tmp_path: Path) -> None:
    record(CachedTeacher(teacher, tmp_path), tiny.prompts(2))
    assert (
        CachedTeacher(LocalTeacher(tiny.tiny_teacher()), tmp_path).missing(
            *asking(teacher, 2)[:2], [True] * 2
        )
        == []
    )
    other = tiny.tiny_teacher()
    with torch.no_grad():
        next(other.lm.parameters())[0, 0] += 1e-3
    with pytest.raises(
        ConfigError, match=r"revision weights \w{64}, and this is teacher with revision weights \w{64}"
    ):
        CachedTeacher(LocalTeacher(other), tmp_path)
    with pytest.raises(ConfigError, match="with top_k 20, and this is teacher with top_k 3; set top_k to 20"):
        CachedTeacher(teacher, tmp_path, top_k=3)
    with pytest.raises(ConfigError, match="revision served as tiny; score its texts anew"):
        CachedTeacher(served(files, "http://127.0.0.1:1/v1", top_k=20), tmp_path)
    with pytest.raises(
        ConfigError, match=r"with vocabulary \w{12}, and this is .* is it the same tokenizer\?"
    ):
        CachedTeacher(AbsentTeacher(_with_token(files, tmp_path / "t")), tmp_path)
    with pytest.raises(TeacherError, match="there is none; gold cache build makes one"):
        CachedTeacher(AbsentTeacher(files), tmp_path / "nowhere")


def _with_token(files: Path, folder: Path) -> Path:
    shutil.copytree(files, folder)
    with_added(Tokenizer.from_file(str(files / "tokenizer.json"))).save(str(folder / "tokenizer.json"))
    return folder


def test_a_served_teacher_is_told_from_another_of_its_name(
    files: Path, tmp_path: Path, teacher: LocalTeacher
) -> None:
    with ModelServer(teacher.model) as server:
        there = served(files, server.url)
        with CachedTeacher(there, tmp_path, revision="2026-11").cache:
            record(CachedTeacher(there, tmp_path, revision="2026-11"), tiny.prompts(2))
    with pytest.raises(
        ConfigError, match=r"revision served as tiny, 2026-11, and this is .* served as tiny, 2026-12"
    ):
        CachedTeacher(there, tmp_path, revision="2026-12")
    with pytest.raises(
        ConfigError, match=r"top_k is 3, and the server is asked for 5; leave the cache's out"
    ):
        CachedTeacher(there, tmp_path, top_k=3, revision="2026-11")


# As a user


class Bench:
    """A configuration whose teacher has a cache, and commands on it."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        tiny.save_pair(folder)
        self.folder, self.cache, self.capfd, self.patch = folder, folder / "cache", capfd, patch
        teacher = {"path": str(folder / "teacher"), "device": "cpu", "cache": {"path": str(self.cache)}}
        self.settings = tiny.run_settings(
            folder, folder / "run", teacher=teacher, train__steps=2, train__prompts_per_step=2,
            train__checkpoint_every=9, evaluate__every=9, evaluate__prompts=1,
            objectives=[{"name": "forward_kl"}],
        )  # fmt: skip

    def gold(self, *words: object) -> Ended:
        file = tiny.write_settings(self.folder / "run.yaml", self.settings)
        words = tuple(file if word == "CONFIG" else word for word in words)
        return run_gold(self.patch, self.capfd, *words)

    def refused(self, *words: object) -> str:
        done = self.gold(*words)
        # The server's own threads may complain of clients that went away.
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert (done.code, len(lines)) == (1, 1), done
        return lines[0]

    def student(self, run: str) -> bytes:
        return (self.folder / run / "student" / "model.safetensors").read_bytes()


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(gold.run, "_draw", lambda *_: None)  # takes seconds
    return Bench(tmp_path, capfd, monkeypatch)


ALONE = ("rollout.on_policy=0", "rollout.max_new_tokens=60", "teacher.cache.missing=stop")


def test_build_info_verify_merge_and_train_without_the_teacher(bench: Bench) -> None:
    done = bench.gold("cache", "build", "CONFIG", "student.path=nowhere")
    assert done.code == 0, done
    last, line = done.out.splitlines()[-2:]
    assert last.startswith("40 of 40 texts, ")
    assert last.endswith(" tokens/s")
    assert line.startswith(f"{bench.cache}: 40 texts, ")
    again = bench.gold("cache", "build", "CONFIG")
    assert again.out.splitlines()[-2].startswith("40 of 40 texts, 0 tokens asked")
    assert again.out.splitlines()[-1] == line
    facts = json.loads(bench.gold("cache", "info", bench.cache, "--json").out)
    assert facts["texts"] == 40
    assert facts["top_k"] == 20
    assert facts["bytes_per_token"] == pytest.approx(facts["bytes"] / facts["tokens"], abs=0.01)
    shown = bench.gold("cache", "info", bench.cache).out
    assert len(shown.splitlines()) == len(facts)
    assert "bytes per token" in shown
    for file in (bench.folder / "teacher").glob("*.safetensors"):
        file.unlink()
    done = bench.gold("train", "CONFIG", *ALONE)
    assert done.code == 0, done
    assert "evaluations leave out" in done.out
    assert bench.gold("cache", "merge", bench.folder / "copy", bench.cache, bench.cache).code == 0
    assert bench.gold("cache", "verify", bench.folder / "copy").out.endswith("0 parts damaged or cut short\n")
    shard = bench.cache / "000000.scores"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    done = bench.gold("cache", "verify", bench.cache)
    assert done.code == 1
    assert done.out.startswith(f"{shard}: bytes ")
    assert "gold cache merge NEW" in done.out
    done = bench.gold("cache", "merge", bench.folder / "other", bench.cache)
    assert done.out.startswith(f"left out: {shard}: bytes ")
    assert bench.gold("cache", "merge", bench.folder / "other", bench.folder / "copy").code == 0
    facts = json.loads(bench.gold("cache", "info", bench.folder / "other", "--json").out)
    assert (facts["texts"], facts["damaged"]) == (40, 0)


def test_a_second_run_needs_no_server(bench: Bench) -> None:
    with ModelServer(tiny.tiny_teacher()) as server:
        there = {"url": server.url, "model": "tiny", "top_k": 5, "retries": 0}
        bench.settings["teacher"]["served"] = there
        assert bench.gold("train", "CONFIG").code == 0
        asked = len(server.requests)
        done = bench.gold("train", "CONFIG", f"output={bench.folder / 'second'}")
        assert (done.code, len(server.requests)) == (0, asked), done
        # The first text that is missing has the server examined, which is another one now.
        server.tokenizer = tiny.tiny_student().vocabulary
        line = bench.refused("train", "CONFIG", f"output={bench.folder / 'other'}", "train.seed=9")
        assert line.startswith(
            "error: after step 0: this pair cannot be trained: tokenization: the server reads"
        )
    assert bench.student("run") == bench.student("second")


@pytest.mark.slow
def test_evaluate_and_doctor_without_the_teacher(bench: Bench) -> None:
    assert bench.gold("cache", "build", "CONFIG").code == 0
    for file in (bench.folder / "teacher").glob("*.safetensors"):
        file.unlink()
    done = bench.gold("eval", "CONFIG", *ALONE)
    assert done.code == 0, done
    # A run would ask the teacher what the cache lacks.
    assert bench.gold("doctor", "CONFIG").code == 1
    bench.settings["teacher"]["cache"]["missing"] = "stop"
    for weights in ((), ("--weights",)):
        done = bench.gold("doctor", "CONFIG", *weights)
        assert done.code == 0, done


def test_a_build_that_was_stopped_goes_on_where_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gold.teachers.cached._BATCH_TOKENS", 200)
    with ModelServer(tiny.tiny_teacher()) as server:
        bench.settings["teacher"]["served"] = {
            "url": server.url, "model": "tiny", "top_k": 5, "retries": 0, "concurrency": 1,
        }  # fmt: skip
        server.faults = lambda n: "500" if n >= 40 else None
        assert "answers 500: CUDA error" in bench.refused("cache", "build", "CONFIG")
        kept = len(ScoreCache.open(bench.cache))
        assert 10 < kept < 40
    with ModelServer(tiny.tiny_teacher()) as server:
        bench.settings["teacher"]["served"]["url"] = server.url
        done = bench.gold("cache", "build", "CONFIG")
        assert done.code == 0, done
        asked, server.scored = server.scored, 0
        assert bench.gold("cache", "build", "CONFIG").code == 0
        # What is left is the examination of the server.
        assert asked - server.scored == 40 - kept
    assert len(ScoreCache.open(bench.cache)) == 40


def test_bad_input_is_one_line(bench: Bench) -> None:
    nowhere = bench.folder / "nowhere"
    for command in ("info", "verify"):
        assert (
            bench.refused("cache", command, nowhere)
            == f"error: cache {nowhere}: there is none; gold cache build makes one"
        )
    assert "there is none" in bench.refused("cache", "merge", bench.folder / "a", nowhere)
    assert "cache" in bench.refused("train", "CONFIG", *ALONE)
    assert not (bench.folder / "run").exists()
    file = bench.folder / "file"
    file.write_text("x")
    assert "is a file; give a folder" in bench.refused(
        "cache", "build", "CONFIG", f"teacher.cache.path={file}"
    )
    prompts = bench.folder / "p.jsonl"
    prompts.write_text('{"prompt": "1 +1 ="}\n')
    data = ("data.task=null", f"data.prompts={prompts}", f"data.heldout={prompts}")
    assert "none of the 1 training prompts has a completion" in bench.refused(
        "cache", "build", "CONFIG", *data
    )
    prompts.write_text('{"prompt": "1 +1 =", "completion": " 2"}\n{"prompt": "1 +2 ="}\n')
    done = bench.gold("cache", "build", "CONFIG", *data)
    assert done.code == 0, done
    assert "1 of 2 training prompts have no completion, and are left out" in done.out
    assert "with top_k 20, and this is" in bench.refused("train", "CONFIG", "teacher.cache.top_k=5")
    served = ("teacher.served.url=http://h/v1", "teacher.served.model=m")
    assert "a server is asked for teacher.served.top_k: leave it out" in bench.refused(
        "train", "CONFIG", *served, "teacher.cache.top_k=5"
    )
    assert "gives top_k, and objective uld needs rows: it takes a teacher without a cache" in bench.refused(
        "train", "CONFIG", "objectives.0.name=uld"
    )
    assert "it takes teacher.cache.top_k above 0" in bench.refused("train", "CONFIG", "teacher.cache.top_k=0")
    del bench.settings["teacher"]["cache"]
    assert "teacher.cache: it names no folder to build; set teacher.cache.path" in bench.refused(
        "cache", "build", "CONFIG"
    )


def test_a_cut_short_cache_is_told_of(bench: Bench) -> None:
    assert bench.gold("cache", "build", "CONFIG").code == 0
    shard = bench.cache / "000000.scores"
    shard.write_bytes(shard.read_bytes()[:-200])
    assert "lacks " in bench.refused("train", "CONFIG", *ALONE, "train.steps=40")
    done = bench.gold("cache", "build", "CONFIG")
    assert done.code == 0, done
    assert "1 of its parts are damaged or cut short" in done.out
    assert done.out.splitlines()[-1].startswith(f"{bench.cache}: 40 texts, ")
