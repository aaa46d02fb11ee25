"""`gold doctor`: each check has a pair that passes it and one that does not; exit codes, JSON, a run's pre-flight."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import Ended, run_gold
from support.tokenizers import (
    BOS,
    CORPUS,
    EOS,
    byte_level_bpe,
    character_level,
    families,
    sentencepiece_bpe,
    with_added,
    without_bytes,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.demo.models import character_tokenizer, word_tokenizer
from gold.doctor import report as report_module
from gold.doctor import weights as weights_module
from gold.doctor.checks import PAIR_CHECKS, examine_pair
from gold.doctor.finding import Finding, judge
from gold.doctor.prompts import PROMPT_CHECKS
from gold.doctor.report import diagnose, print_report, verdict_line
from gold.doctor.sample import RUN_TEXTS, SAMPLE
from gold.doctor.server import SERVER_CHECKS, STUDENT_CHECKS
from gold.doctor.side import Side, read_side
from gold.doctor.sizes import parameters, step_memory
from gold.doctor.weights import (
    LARGEST_SELF_KL,
    WEIGHT_CHECKS,
    bits_per_byte,
    examine_weights,
    self_divergence,
)
from gold.errors import ConfigError
from gold.inspect.score import PairScorer
from gold.models.adapters import add_adapters, save_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model, wrap_model
from gold.tokenize.roles import Roles
from gold.tokenize.vocabulary import Vocabulary

Make = Callable[..., Side]
CHATML = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def folder_of(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    eos: str | None = EOS,
    bos: str | None = BOS,
    template: str | None = None,
    stops: list[int] | None = None,
    **config: Any,
) -> Path:
    """A tokenizer as a model's folder has it; further keywords are config.json."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": eos, "bos_token": bos, "chat_template": template}
    settings = {name: value for name, value in named.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes sides, each in a folder of its own."""
    made: list[Side] = []

    def side(tokenizer: Tokenizer, **settings: Any) -> Side:
        made.append(read_side("", folder_of(tmp_path / str(len(made)), tokenizer, **settings)))
        return made[-1]

    return side


def found(name: str, student: Side, teacher: Side, texts: Sequence[str] = ()) -> Finding:
    """The one check of that name."""
    sides = replace(student, role="student"), replace(teacher, role="teacher")
    (check,) = [check for check in examine_pair(*sides, texts).checks if check.check == name]
    assert (check.status == "pass") == (not check.advice)
    return check


# Vocabularies


def test_families_are_named(make: Make) -> None:
    check = found("tokenizers", make(byte_level_bpe()), make(sentencepiece_bpe()))
    assert check.status == "pass"
    assert all(part in check.found for part in ("byte-level, 400 ids", "byte-fallback"))


def test_a_tokenizer_that_cannot_be_spelled_fails_and_nothing_else_is_said(tmp_path: Path) -> None:
    unsteady = byte_level_bpe()
    unsteady.model.dropout = 0.1
    folders = [folder_of(tmp_path / name, t) for name, t in (("a", unsteady), ("b", byte_level_bpe()))]
    report = diagnose(*folders)
    assert [check.check for check in report.checks] == ["tokenizers"]
    assert report.verdict == "fail"
    assert re.search(r"student: .*dropout is 0\.1", verdict_line(report))
    assert len(diagnose(folders[0], folders[0]).checks) == 2


def test_the_same_vocabulary_is_told_by_content(make: Make) -> None:
    one, other = byte_level_bpe(), byte_level_bpe(CORPUS[::-2])
    assert found("vocabulary", make(one), make(one)).found.startswith("identical")
    check = found("vocabulary", make(one), make(other))
    assert one.get_vocab_size() == other.get_vocab_size()
    assert (check.status, "different" in check.found) == ("pass", True)


def test_the_same_ids_with_other_stops_are_warned_of(make: Make) -> None:
    tokenizer = with_added(byte_level_bpe())
    turn = tokenizer.token_to_id("<|turn|>")
    check = found("vocabulary", make(tokenizer), make(tokenizer, stops=[turn]))
    assert check.status == "warn"
    assert "stop ids: [1] here, [1, 402] there" in check.found


def test_a_vocabulary_that_differs_a_little_is_warned_of(make: Make) -> None:
    more = byte_level_bpe()
    more.add_tokens(["<think>"])
    check = found("vocabulary", make(byte_level_bpe()), make(more))
    assert check.status == "warn"
    assert "size: 400 here, 401 there" in check.found


@pytest.mark.parametrize("other", ["byte-level", "byte-level, digits", "characters", "byte-fallback"])
@pytest.mark.parametrize("stops", [[1], [0, 1]])
def test_sameness_is_the_one_that_training_goes_by(other: str, stops: list[int]) -> None:
    mine = Vocabulary.load(families()["byte-level"], stop_ids=[1])
    theirs = Vocabulary.load(families()[other], stop_ids=stops)
    assert (
        VocabularyPair(mine, theirs).same == mine.same_as(theirs) == (other == "byte-level" and stops == [1])
    )


# Special tokens


def test_output_rows(make: Make) -> None:
    student, teacher = make(byte_level_bpe(), vocab_size=512), make(sentencepiece_bpe(), vocab_size=600)
    check = found("output matrix", student, teacher)
    assert check.status == "pass"
    assert "student 512 rows for 400 ids (112 of padding)" in check.found
    check = found("output matrix", make(byte_level_bpe(), text_config={"vocab_size": 398}), teacher)
    assert check.status == "fail"
    assert all(part in check.found for part in ("student", "400 ids", "398 rows", "2 tokens"))
    bare = make(byte_level_bpe())
    assert any("output matrix" in line for line in examine_pair(bare, bare).unchecked)


def test_a_row_may_be_missing_for_a_special_token(make: Make) -> None:
    more = byte_level_bpe()
    more.add_special_tokens(["<image>"])
    check = found("output matrix", make(more, vocab_size=400), make(more, vocab_size=401))
    assert check.status == "pass"
    assert "400 rows for 401 ids (1 ids without a row)" in check.found


def test_stops(make: Make, tmp_path: Path) -> None:
    good = make(byte_level_bpe())
    check = found("stop tokens", good, make(sentencepiece_bpe()))
    assert (check.status, check.found) == ("pass", "student <eos>; teacher <eos>")
    check = found("stop tokens", good, make(byte_level_bpe(), eos=None))
    assert (check.status, "teacher" in check.found, "roles.stop" in check.advice) == ("fail", True, True)
    byte_level_bpe().save(str(tmp_path / "bare.json"))
    check = found("stop tokens", good, read_side("teacher", tmp_path / "bare.json"))
    assert (check.status, "teacher" in check.found) == ("warn", True)


def test_an_answer_that_ends_otherwise_than_the_stops_say_is_warned_of(make: Make, tmp_path: Path) -> None:
    tokenizer = with_added(byte_level_bpe())
    folder = folder_of(tmp_path / "turns", tokenizer, template=CHATML.replace("eos_token", "'<|turn|>'"))
    good = read_side("", folder)
    assert (found("stop tokens", good, good).status, len(good.vocabulary.stop_ids)) == ("pass", 2)
    check = found("stop tokens", read_side("", folder, Roles(stop=[EOS])), good)
    assert (check.status, check.concerns) == ("warn", ("messages",))
    assert "student ends an answer with <|turn|>" in check.found


def test_a_stop_in_config_json_counts_where_no_other_file_names_one(make: Make) -> None:
    check = found("stop tokens", make(byte_level_bpe(), eos=None, eos_token_id=[1]), make(byte_level_bpe()))
    assert check.status == "pass"


def test_bos(make: Make) -> None:
    tokenizer = without_post_processor(byte_level_bpe())
    good = make(byte_level_bpe(), template="{{ bos_token }}{{ messages[0].content }}")
    check = found("BOS", good, make(tokenizer, bos=None))
    assert (check.status, check.found) == ("pass", "student <bos>, before every text; teacher none")
    written = make(tokenizer, template="{{ bos_token }}{{ messages[-1].content }}")
    assert "chat template" in found("BOS", written, good).found
    assert "stop token" in found("BOS", make(tokenizer, bos=EOS), good).found
    check = found("BOS", good, make(tokenizer))
    assert (check.status, "teacher <bos>, " in check.found, "roles.bos" in check.advice) == (
        "warn",
        True,
        True,
    )


def without_post_processor(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"post_processor": None}))


def test_chat_templates(make: Make) -> None:
    def of(student: str | None, teacher: str | None) -> Finding:
        tokenizer = with_added(byte_level_bpe())
        check = found("chat template", make(tokenizer, template=student), make(tokenizer, template=teacher))
        assert check.concerns == (() if check.status == "pass" else ("messages",))
        return check

    thinking = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    refusing = "{{ raise_exception('no') }}"
    assert "none" in of(None, None).found
    assert "the same" in of(CHATML, CHATML).found
    assert "different" in of(CHATML, CHATML + " ").found
    assert "(teacher: " in of(CHATML, refusing).found
    check = of(CHATML, None)
    assert (check.status, "only the student" in check.found) == ("warn", True)
    check = of(CHATML, thinking)
    assert (check.status, "of the teacher opens <think>" in check.found) == ("warn", True)
    assert of(thinking, thinking).status == "pass"


def test_markers(make: Make) -> None:
    plain, token, special = byte_level_bpe(), byte_level_bpe(), byte_level_bpe()
    token.add_tokens(["<think>"])
    special.add_special_tokens(["<think>"])
    assert "all are text" in found("markers", make(plain), make(plain)).found
    # An added token with bytes is the same text to both, and what both have as special is handed over.
    for one, other in ((plain, token), (token, token), (special, special)):
        check = found("markers", make(one), make(other))
        assert (check.status, "<think>" in check.found) == ("pass", True)
    check = found("markers", make(token), make(special))
    assert check.status == "warn"
    assert check.found == "<think> (student: added token, teacher: special token)"
    check = found("markers", make(special), make(plain))
    assert check.found == "<think> (student: special token, teacher: text)"


def test_the_same_bytes_with_other_markers_are_two_vocabularies(make: Make) -> None:
    think, pause = byte_level_bpe(), byte_level_bpe()
    think.add_special_tokens(["<think>"])
    pause.add_special_tokens(["<pause>"])
    student, teacher = make(think), make(pause)
    assert student.vocabulary.fingerprint == teacher.vocabulary.fingerprint
    assert "the text '<think>' here, the text '<pause>' there" in found("vocabulary", student, teacher).found
    assert not VocabularyPair(student.marked, teacher.marked).same


# Texts


def test_bytes_that_a_side_lacks(make: Make) -> None:
    whole, lacking = make(byte_level_bpe()), make(without_bytes(byte_level_bpe(), b"x\x01\xff"))
    assert found("bytes", whole, make(sentencepiece_bpe())).status == "pass"
    check = found("bytes", lacking, whole)
    assert check.status == "warn"
    # ff is no byte of UTF-8.
    assert "student lacks 2 of the 243 bytes of UTF-8 (01 78)" in check.found
    # What a run never writes need not be there, and what it writes must be.
    assert found("bytes", lacking, whole, ["a word", "without it"]).status == "pass"
    check = found("bytes", whole, make(without_bytes(byte_level_bpe(), b"x\x01\xff")), ["xxxxx y"])
    assert check.status == "fail"
    assert all(part in check.found for part in ("this run's texts", "86%", "teacher"))


@pytest.mark.parametrize("name", ["unigram", "wordpiece, uncased"])
def test_a_vocabulary_without_bytes_is_warned_of(make: Make, name: str) -> None:
    check = found("bytes", make(byte_level_bpe()), make(families()[name]))
    assert (check.status, "teacher has no byte tokens" in check.found) == ("warn", True)


def test_a_normaliser_that_rewrites_is_warned_of(make: Make) -> None:
    plain, lower = families()["byte-level"], families()["byte-level, NFKC and lower case"]
    check = found("bytes", make(plain), make(lower))
    assert (check.status, "teacher changes" in check.found) == ("warn", True)


def test_a_tokenizer_of_fourteen_characters_is_judged_by_the_run(make: Make) -> None:
    student, teacher = make(word_tokenizer(tiny.texts(), 120)), make(character_tokenizer())
    alone = examine_pair(student, teacher)
    assert [check.check for check in alone.failures] == ["bytes"]
    assert "gold doctor CONFIG" in alone.failures[0].advice
    assert not examine_pair(student, teacher, tiny.texts(8)).failures


def test_shared_edges(make: Make) -> None:
    def pairs(first: str, second: str) -> Tokenizer:
        tokenizer = Tokenizer(
            models.BPE(vocab={BOS: 0, EOS: 1, "a": 2, "b": 3, first + second: 4}, merges=[(first, second)])
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([BOS, EOS])
        return tokenizer

    # ab|ab|ab and a|ba|ba|b
    student, teacher = make(pairs("a", "b")), make(pairs("b", "a"))
    check = found("shared boundaries", student, teacher, ["ababab", "abab"])
    assert check.status == "fail"
    assert "none inside this run's texts" in check.found
    assert found("shared boundaries", student, teacher, ["abab", "aabb"]).status == "pass"


def test_one_to_one(make: Make) -> None:
    student, teacher = make(word_tokenizer(tiny.texts(), 120)), make(character_tokenizer())
    check = found("one-to-one tokens", student, teacher, tiny.texts(8))
    assert check.status == "warn"
    assert "shared" in check.concerns
    assert f" {RUN_TEXTS};" in check.advice
    same = found("one-to-one tokens", student, student)
    assert (same.status, same.found.count("100%")) == ("pass", len(SAMPLE))


def test_coverage_is_what_the_chunks_say(make: Make) -> None:
    student, teacher = make(byte_level_bpe()), make(sentencepiece_bpe())
    coverage = examine_pair(student, teacher, ["two words"]).coverage
    assert list(coverage) == [RUN_TEXTS, *SAMPLE]
    for kind, texts in SAMPLE.items():
        sides = [[set(s.vocabulary.encode(t).ends.tolist()) for t in texts] for s in (student, teacher)]
        edges = [mine & theirs for mine, theirs in zip(*sides, strict=True)]
        assert coverage[kind].bytes == sum(len(t.encode()) for t in texts)
        assert coverage[kind].chunks == sum(map(len, edges))
        cells = [np.diff([0, *sorted(e)]).max() for e in edges]
        assert coverage[kind].largest_chunk_bytes == max(cells)


def test_digits(make: Make) -> None:
    whole, single = make(families()["byte-level"]), make(families()["byte-level, digits"])
    check = found("digits", whole, single, ["22 of 333", "55555"])
    assert check.status == "warn"
    assert "shared" in check.concerns
    assert re.search(r"student up to \d digits a token, teacher digit by digit", check.found)
    assert "all split alike" in found("digits", single, single).found
    # Digits that a side cannot spell are not judged.
    none = make(without_bytes(byte_level_bpe(), b"0123456789"))
    assert "no number" in found("digits", whole, none).found


def test_hard_edges(make: Make) -> None:
    digits, none = make(families()["byte-level, digits"]), make(sentencepiece_bpe())
    check = found("stable boundaries", digits, none)
    assert (check.status, check.concerns) == ("warn", ("span_pg", "span"))
    assert check.found.startswith("none in ")
    assert re.match(r"\d+ in [\d,]+ bytes: ", found("stable boundaries", none, digits).found)
    assert found("stable boundaries", none, digits, ["no digits at all in this text"]).status == "warn"


def test_prefix_map(make: Make) -> None:
    whole, lacking = make(byte_level_bpe()), make(without_bytes(byte_level_bpe(), b"the"))
    assert "0 with none" in found("prefixes", whole, lacking).found
    check = found("prefixes", lacking, whole)
    assert (check.status, check.concerns) == ("warn", ("prefix",))
    vocabulary = whole.vocabulary
    texts = [vocabulary.token_bytes(i) for i in np.flatnonzero(~vocabulary.is_special)]
    none = sum(text[:1] in (b"t", b"h", b"e") for text in texts)
    assert f"{none} with none" in check.found


@settings(max_examples=20)
@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_texts_of_a_run_get_a_verdict(texts: list[str]) -> None:
    report = examine_pair(ANY[0], ANY[1], texts)
    assert report.verdict in ("pass", "warn", "fail")
    assert len({check.check for check in report.checks}) == len(report.checks)


ANY = [read_side("student", families()["byte-level, bytes missing"]), read_side("teacher", character_level())]


# Memory


def sized_model(make_config: Any, make_model: Any, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    model = make_model(make_config(**sizes))
    return model, json.loads(model.config.to_json_string())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_parameters_are_counted_from_config_json(tied: bool, heads: tuple[int, int], make: Make) -> None:
    model, config = sized_model(
        LlamaConfig,
        LlamaForCausalLM,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=tied,
    )
    assert parameters(make(byte_level_bpe(), **config)) == sum(p.numel() for p in model.parameters())


def test_parameters_are_counted_in_the_weights_where_they_are(make: Make) -> None:
    model, config = sized_model(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    side = make(byte_level_bpe(), **config)
    assert side.folder is not None
    model.save_pretrained(side.folder)
    assert parameters(side) == sum(p.numel() for p in model.parameters())


SIZES = {
    "hidden_size": 10,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 100,
}


def test_memory_by_hand(make: Make) -> None:
    student, teacher = make(byte_level_bpe(), **SIZES), make(byte_level_bpe(), **SIZES, dtype="bfloat16")
    # 2·10·(16 + 8) + 3·10·20 + 2·10 = 1,100 a layer, 10 of the last norm, 2·100·10 of the matrices.
    count = 3 * 1100 + 10 + 2000
    needed = step_memory(student, teacher, 2, 7)
    assert needed is not None
    assert (needed.student, needed.teacher) == (16 * count, 2 * count)
    assert needed.activations == 2 * 7 * 3 * (90 + 80 + 3 * 24) * 4
    assert needed.logits == 6 * 14 * 100 * 4
    assert needed.total == needed.student + needed.teacher + needed.activations + needed.logits
    lora = {"rank": 2, "targets": None, "modules_to_save": ["lm_head"]}
    adapted = step_memory(student, teacher, 2, 7, lora)
    assert adapted is not None
    # 2·(10 + 16) + 2·(10 + 8) + 3·(10 + 20) rows and columns of adapters a layer.
    assert adapted.trained_parameters == 2 * 3 * 178 + 1000
    assert adapted.student == 4 * count + 16 * adapted.trained_parameters
    for gone in ("hidden_size", "vocab_size"):
        kept = {name: size for name, size in SIZES.items() if name != gone}
        assert step_memory(make(byte_level_bpe(), **kept), teacher, 2, 7) is None
    assert step_memory(make(byte_level_bpe(), **SIZES, num_local_experts=8), teacher, 2, 7) is None


def test_a_folder_of_adapters_says_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pair(tmp_path)
    model = add_adapters(load_model(tmp_path / "student"), rank=3)
    save_adapters(model.lm, tmp_path / "adapter")
    print_report(diagnose(tmp_path / "adapter", tmp_path / "teacher"))
    told = capsys.readouterr().out
    assert f"pass  adapter: the student is an adapter (LORA of rank 3) of {tmp_path / 'student'}\n" in told
    assert "of adapters trained" in told
    side = read_side("student", tmp_path / "adapter")
    assert side.folder == tmp_path / "student"
    assert parameters(side) == parameters(read_side("student", tmp_path / "student"))
    view = PairScorer.load(str(tmp_path / "adapter"), str(tmp_path / "teacher"))
    assert view.student.name == str(tmp_path / "adapter")
    assert f"base {tmp_path / 'student'}" in capsys.readouterr().err


def test_memory_is_compared_with_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [folder_of(tmp_path / name, byte_level_bpe(), **SIZES) for name in "ab"]
    for here, status in ((2**40, "pass"), (1000, "warn"), (None, "pass")):
        monkeypatch.setattr(report_module, "machine_memory", lambda here=here: here)
        (check,) = [c for c in diagnose(*folders, sequences=4, tokens=5).checks if c.check == "memory"]
        assert (check.status, "for 4 × 5 tokens" in check.found) == (status, True)
    bare = [folder_of(tmp_path / name, byte_level_bpe()) for name in "cd"]
    assert "memory: no config.json of student and teacher" in diagnose(*bare).unchecked


# Weights


def padded(model: LanguageModel, rows: int) -> LanguageModel:
    """The model with an output matrix of more rows than its tokenizer has ids."""
    model.lm.resize_token_embeddings(rows)
    return wrap_model(model.lm, model.tokenizer, name=model.name)


def prompts() -> list[Prompt]:
    return [Prompt(p.key, p.text, completion=p.completion) for p in tiny.prompts(6)]


@pytest.mark.parametrize("rows", [None, 160])
def test_a_model_is_its_own_perfect_teacher(rows: int | None) -> None:
    for model in (tiny.tiny_student(), tiny.tiny_teacher()):
        whole = padded(model, rows) if rows else model
        assert abs(self_divergence(whole, prompts())) < 1e-7


def test_a_model_that_answers_differently_each_time_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    steady, unsteady = tiny.tiny_student(), tiny.tiny_teacher()
    texts = tiny.texts(6)
    before = {c.check: c for c in examine_weights(steady, unsteady, texts, 2, 8)}
    assert before["self KL"].status == "pass"
    matrix = unsteady.lm.get_output_embeddings()
    matrix.register_forward_hook(lambda module, given, logits: logits + torch.randn_like(logits))
    after = {c.check: c for c in examine_weights(steady, unsteady, texts, 2, 8)}
    assert after["self KL"].status == "fail"
    assert str(LARGEST_SELF_KL) in after["self KL"].advice


def uniform(model: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.zero_()
    return model


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    for model in (uniform(tiny.tiny_student()), uniform(padded(tiny.tiny_student(), 160))):
        spelled = [model.vocabulary.encode(p.completion or "") for p in prompts()]
        tokens, size = sum(len(s) for s in spelled), sum(len(s.data) for s in spelled)
        rows = model.lm.get_output_embeddings().weight.shape[0]
        assert bits_per_byte(model, prompts()) == pytest.approx(np.log2(rows) * tokens / size, rel=1e-5)


def test_bits_per_byte_are_judged() -> None:
    def of(student: LanguageModel, teacher: LanguageModel) -> Finding:
        (check,) = [
            c for c in examine_weights(student, teacher, tiny.texts(6), 1, 4) if c.check == "bits per byte"
        ]
        return check

    good, worse = uniform(tiny.tiny_student()), uniform(padded(tiny.tiny_student(), 400))
    blind = uniform(padded(tiny.tiny_teacher(), 40))
    assert of(worse, good).status == "pass"
    check = of(good, worse)
    assert check.status == "warn"
    assert "student" in check.advice
    check = of(good, blind)
    assert check.status == "warn"
    assert "the teacher hardly" in check.advice


def test_seconds_are_measured_and_slow_dtypes_named() -> None:
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    *_, check = examine_weights(student, teacher, tiny.texts(6), 3, 16)
    assert (check.check, check.status) == ("time", "pass")
    assert "3 × 16 tokens: student 0." in check.found
    teacher.lm.to(torch.bfloat16)
    *_, check = examine_weights(student, teacher, tiny.texts(6), 3, 16)
    assert (check.status, "teacher.dtype=float32" in check.advice) == ("warn", True)


def test_weights_are_tried_on_a_kilobyte() -> None:
    split = weights_module._split(["one two three four " * 40, " ", "x" * 5000, "y y"])
    assert [len(p.text + p.completion) for p in split] == [760, 264]  # type: ignore[operator]
    assert split[0].text == "one two three"


def test_texts_too_short_for_weights_give_way_to_the_sample() -> None:
    names = [c.check for c in examine_weights(tiny.tiny_student(), tiny.tiny_student(), ["", "a", " "], 1, 4)]
    assert names == ["self KL", "bits per byte", "time"]


# The command


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `gold` with arguments and gives its exit code, stdout and stderr."""
    return partial(run_gold, monkeypatch, capfd)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tiny models, padded, and a configuration of one step."""
    folder = tmp_path_factory.mktemp("pair")
    for name, model, rows in (
        ("student", tiny.tiny_student(), 144),
        ("teacher", tiny.tiny_teacher(), 64),
        ("same", tiny.tiny_student(seed=4), 160),
    ):
        save_model(padded(model, rows), folder / name)
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's pictures take longer than its step."""
    monkeypatch.setattr("gold.run.plot_run", lambda folder: [])


def one_step(saved: Path, folder: Path, **changes: Any) -> Path:
    settings = tiny.run_settings(
        saved, folder / "run", train__steps=1, evaluate__prompts=2, evaluate__samples=0, **changes
    )
    return tiny.write_settings(folder / "run.yaml", settings)


def test_exit_codes_and_json(call: Any, saved: Path, tmp_path: Path) -> None:
    done = call("doctor", one_step(saved, tmp_path), "--json", "--weights", "--sequences", 2)
    assert (done.code, done.err) == (0, "")
    content = json.loads(done.out)
    assert set(content) == {"verdict", "checks", "coverage", "unchecked"}
    assert content["verdict"] == "warn"
    assert all(set(c) == {"check", "status", "found", "advice", "concerns"} for c in content["checks"])
    names = [c["check"] for c in content["checks"]]
    assert names[:2] == ["tokenizers", "vocabulary"]
    assert {"output matrix", "memory", "self KL", "bits per byte", "time"} < set(names)
    assert list(content["coverage"]) == [RUN_TEXTS, *SAMPLE]
    assert not content["unchecked"]
    rows = next(c for c in content["checks"] if c["check"] == "output matrix")
    assert "144 rows for 74 ids (70 of padding)" in rows["found"]
    # Without a run these tokenizers are judged by prose, of which they have no letter.
    done = call("doctor", saved / "student", saved / "teacher")
    assert (done.code, done.err) == (1, "")
    *_, last = done.out.splitlines()
    assert last.startswith("fail: this pair cannot be trained: bytes: ")
    assert "\x1b" not in done.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere.json", "{student}"], "error: no tokenizer at nowhere.json"),
        (["{student}", "nowhere/at/all"], "error: no tokenizer at nowhere/at/all"),
        (["{student}"], "error: {student} is a folder: name the teacher too"),
        (["nowhere.yaml"], "error: nowhere.yaml cannot be read"),
        (["nowhere.yaml", "{student}"], "error: nowhere.yaml is a configuration, which names its models"),
    ],
)
def test_what_is_not_there_is_one_line(call: Any, saved: Path, arguments: list[str], line: str) -> None:
    student = str(saved / "student")
    done = call("doctor", *(a.format(student=student) for a in arguments))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(line.format(student=student))
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["a", "b", "--tokens", "0"]])
def test_usage_errors_exit_with_2(call: Any, arguments: list[str]) -> None:
    assert call("doctor", *arguments).code == 2


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_on_a_terminal_and_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    report = examine_pair(ANY[0], ANY[1])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = _Terminal(), io.StringIO()
    print_report(report, stream=terminal)
    print_report(report, stream=pipe)
    assert "\x1b[" in terminal.getvalue()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    # The verdict is one line however long it is; the terminal folds it.
    assert max(map(len, shown.splitlines()[:-2])) <= 80
    assert "…" not in shown.split("tokens of")[1].split("\n")[0]
    for check in report.checks:
        assert f"{check.status}  {check.check}: {check.found}" in pipe.getvalue()
        assert check.check in shown
    assert pipe.getvalue().splitlines()[-1] == verdict_line(report)


def test_tokenizer_files_need_no_torch(tmp_path: Path) -> None:
    byte_level_bpe().save(str(tmp_path / "student.json"))
    sentencepiece_bpe().save(str(tmp_path / "teacher.json"))
    arguments = ["gold", "doctor", str(tmp_path / "student.json"), str(tmp_path / "teacher.json")]
    program = (
        f"import sys; sys.argv = {arguments}\nimport gold.cli\ntry: gold.cli.main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "warn: this pair can be trained" in done.stdout


# A run


@pytest.mark.parametrize("teacher", ["teacher", pytest.param("same", marks=pytest.mark.slow)])
def test_rows_beyond_the_tokenizer_train(call: Any, saved: Path, tmp_path: Path, teacher: str) -> None:
    """Padding rows on both sides: of two vocabularies, and of one with 144 rows in one model and 160 in the other."""
    settings = one_step(saved, tmp_path, teacher__path=str(saved / teacher))
    done = call("train", settings)
    assert (done.code, done.err) == (0, "")
    assert ("one vocabulary" in done.out) == (teacher == "same")
    (record,) = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert record["applied"]
    assert np.isfinite(record["loss"])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_text_of_padding_ids_alone_has_states_that_exist(stopped: bool) -> None:
    """A student with padding rows can sample nothing but padding; the teacher then reads a text without tokens."""
    pair = VocabularyPair(tiny.tiny_student().vocabulary, tiny.tiny_teacher().vocabulary)
    spelled = pair.student.decode([100, 101], rows=144)
    ids = np.append(spelled.ids, pair.student.stop_ids[:1] if stopped else []).astype(np.int32)
    text = AlignedText(ids, spelled, pair.to_teacher(spelled), stopped)
    batch = AlignedBatch([text], pair, torch.device("cpu"))
    rows_S, rows_T = batch.synced_states
    assert len(rows_S) == len(rows_T)
    assert (rows_S < len(ids)).all()
    assert (rows_T < stopped).all()
    span_S, span_T, spans = batch.spans
    assert (len(span_S), len(span_T), spans) == (len(ids), int(stopped), int(stopped))


def words(folder: Path) -> str:
    """Prompts that the tiny tokenizers cannot read: two thirds of their bytes are letters."""
    return str(
        tiny.write_prompts(folder / "words.jsonl", [Prompt(str(n), f"letters{n} = ") for n in range(30)])
    )


def test_a_run_stops_before_a_pair_that_cannot_be_trained(
    call: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gold.build.load_model", None)  # no weights are needed to see it
    done = call("train", one_step(saved, tmp_path, data={"prompts": words(tmp_path)}))
    assert done.code == 1
    assert done.err.startswith("error: this pair cannot be trained: bytes: ")
    assert "(train.doctor=report goes on)" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_it_is_told_to(call: Any, saved: Path, tmp_path: Path) -> None:
    done = call("train", one_step(saved, tmp_path, data={"prompts": words(tmp_path)}), "train.doctor=report")
    assert done.code == 0, done.err
    assert "note: bytes: " in done.out
    assert (tmp_path / "run" / "student").is_dir()


def test_a_run_hears_what_it_minds(call: Any, saved: Path, tmp_path: Path) -> None:
    def notes(name: str, *overrides: str) -> set[str]:
        (tmp_path / name).mkdir()
        done = call("train", one_step(saved, tmp_path / name), *overrides)
        assert done.code == 0, done.err
        return set(re.findall(r"^note: ([a-z -]+):", done.out, re.MULTILINE))

    assert not notes("bytes")
    assert notes("spans", "objectives.0.name=span_pg") == {"stable boundaries"}
    assert "digits" in notes("shared", "objectives.0.support=shared")


def test_the_pair_of_a_run_is_judged_by_its_prompts(call: Any, saved: Path, tmp_path: Path) -> None:
    done = call("doctor", one_step(saved, tmp_path, data={"prompts": words(tmp_path)}))
    assert done.code == 1
    assert "this run's texts" in done.out.splitlines()[-1]


def test_judging_keeps_what_concerns_a_run_and_stops_at_a_failure() -> None:
    findings = [
        Finding("a", "pass", "fine"),
        Finding("b", "warn", "odd", "change it"),
        Finding("c", "warn", "odd", "change it", ("shared",)),
        Finding("d", "fail", "broken", "mend it"),
    ]
    assert judge(findings, {"bytes"}, stop=False) == ["b: odd; change it", "d: broken; mend it"]
    assert len(judge(findings, {"shared"}, stop=False)) == 3
    with pytest.raises(ConfigError, match=r"^teacher x: .*d: broken; mend it"):
        judge(findings, set(), stop=True, whose="teacher x: ")


def test_processes_tell_once(saved: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gold.build
    import gold.build_data
    from gold.config import Config

    told: list[str] = []
    config = Config.load(one_step(saved, tmp_path), ["objectives.0.name=span_pg"])
    data = gold.build_data.load_data(config)
    sides = [read_side(role, saved / role) for role in ("student", "teacher")]
    for rank, count in (("0", 1), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        note = gold.build.note_to(SimpleNamespace(note=told.append))  # type: ignore[arg-type]
        gold.build.examiner_of(config, data, "teacher", note).examine_pair(*sides)
        assert len(told) == count


@pytest.mark.assets("smollm2-135m-instruct", "llama2", "deepseek_v3")
def test_real_pairs() -> None:
    from benchmarks.assets import assets_folder

    names = ("smollm2-135m-instruct", "tokenizers/llama2", "tokenizers/deepseek_v3")
    smollm, llama, deepseek = (read_side("", assets_folder() / name) for name in names)
    assert found("digits", smollm, deepseek).status == "warn"
    assert found("digits", smollm, llama).status == "pass"
    assert found("stable boundaries", smollm, llama).status == "warn"
    assert found("stable boundaries", llama, smollm).status == "pass"
    assert "the student lacks 8 of the 243 bytes" in found("bytes", smollm, deepseek).found
    assert parameters(smollm) == 134_515_008
    started = time.process_time()
    assert not examine_pair(llama, deepseek).failures
    assert time.process_time() - started < 10  # under one


def test_the_documentation_lists_every_check() -> None:
    tables = (PAIR_CHECKS, PROMPT_CHECKS, WEIGHT_CHECKS, SERVER_CHECKS, STUDENT_CHECKS)
    rows = {f"| {check.name} | {check.question} |" for table in tables for check in table}
    link = "([engines.md](engines.md#the-probe))"
    rows.add("| data | Which columns of the prompts are not read? (of a configuration) |")
    rows.add(
        "| duration | How long does the run take, and what would make it shorter? (of a configuration) |"
    )
    rows.add(f"| rollout engine | Does vLLM draw from the weights that are pushed to it? {link} |")
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert rows == {
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| check ")
    }
