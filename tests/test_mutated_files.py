"""Whatever a file holds that others wrote, a command answers, or ends with one line and exit code 1."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.mutations import FILES, fresh, json_mutations
from support.tokenizer_files import byte_level_gguf, ranks_of, tekken
from support.tokenizers import byte_level_bpe, sentencepiece_bpe

from gold.config import Config
from gold.data import load_prompts
from gold.doctor.report import diagnose
from gold.errors import GoldError
from gold.inspect.command import run_align
from gold.models.load import load_model
from gold.tokenize.cache import cached_ids
from gold.tokenize.load import open_source

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
SETTINGS: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken"},
        "pad_token": "<eos>",
        "add_bos_token": True,
        "model_max_length": 10**30,
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    },
    "special_tokens_map.json": {"eos_token": "<eos>", "unk_token": {"content": "x"}},
    "generation_config.json": {"eos_token_id": [1], "bos_token_id": 0},
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 1,
    "text_config": None,
}
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]


def safetensors(header: str) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + bytes(16)


HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every kind of file, all of them whole."""
    folder = tmp_path_factory.mktemp("whole")
    for side in ("student", "teacher"):
        (folder / side).mkdir()
        byte_level_bpe().save(str(folder / side / "tokenizer.json"))
        for name, content in SETTINGS.items():
            (folder / side / name).write_text(json.dumps(content))
        (folder / side / "config.json").write_text(json.dumps(CONFIG))
        (folder / side / "chat_template.jinja").write_text(TEMPLATE)
        (folder / side / "model.safetensors").write_bytes(safetensors(json.dumps(HEADER)))
    model = json.loads(byte_level_bpe().to_str())["model"]
    (folder / "older").mkdir()
    (folder / "older" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (folder / "older" / "merges.txt").write_text("\n".join(["#version", *merges]))
    added = {str(len(model["vocab"])): {"content": "<z>", "special": True}}
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added, "eos_token": "<z>"}
    (folder / "older" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "older" / "added_tokens.json").write_text("{}")
    (folder / "tekken").mkdir()
    content = tekken(ranks_of(json.loads(byte_level_bpe().to_str())), r"\S+|\s+", ["<unk>", "<s>", "</s>"], 3)
    (folder / "tekken" / "tekken.json").write_text(json.dumps(content))
    (folder / "gguf").mkdir()
    byte_level_gguf(folder / "gguf" / "t.gguf", json.loads(byte_level_bpe().to_str()), "gpt-2")
    sentencepiece_bpe().save(str(folder / "other.json"))
    (folder / "text.txt").write_text("a text")
    (folder / "lines.jsonl").write_text('{"text": "a text"}\n')
    (folder / "chat.json").write_text(json.dumps(CHAT))
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "a", "id": 1, "reference": {"a": [1]}, "completion": "b"}\n'
    )
    (folder / "run.yaml").write_text(
        "student: {path: s}\nteacher: {path: t}\ndata: {prompts: p}\noutput: o\ntrain: {steps: 3}\n"
    )
    return folder


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A minute for each test is far more than any needs; a reader that waits for ever would hold up all of them."""

    def late(*_: object) -> None:
        raise SystemExit("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def align(folder: Path, source: str = "student", as_json: bool = False, **more: Any) -> None:
    text = None if more else "a text of it, 24"
    run_align(
        text,
        student=str(folder / source),
        teacher=str(folder / "other.json"),
        stream=io.StringIO(),
        as_json=as_json,
        **{name: folder / file for name, file in more.items()},
    )


ALIGN: dict[str, Callable[[Path], Any]] = {
    "student": align,
    "older": lambda folder: align(folder, "older"),
    "tekken": lambda folder: align(folder, "tekken"),
    "gguf": lambda folder: align(folder, "gguf"),
}


def answers_or_refuses(does: Callable[[Path], Any], folder: Path) -> bool:
    """Whether it answers; what it raises is an error of gold's."""
    said: tuple[Any, ...] = ()
    with contextlib.suppress(GoldError):
        try:
            does(folder)
        except GoldError as error:
            said = error.args
            raise
        return True
    assert said
    assert all(0 < len(str(one)) < 5000 for one in said), said  # printed as one line each: gold.terminal
    return False


WHOLE = [
    *(("student", name) for name in (*SETTINGS, "tokenizer.json", "chat_template.jinja")),
    *(("older", name) for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")),
    ("tekken", "tekken.json"),
    ("gguf", "t.gguf"),
]


@pytest.mark.parametrize(("source", "name"), WHOLE)
def test_a_file_of_a_tokenizer_that_is_no_such_file(
    base: Path, tmp_path: Path, source: str, name: str
) -> None:
    assert answers_or_refuses(ALIGN[source], base)
    for mutate in FILES.values():
        folder = fresh(base, tmp_path / "broken")
        mutate(folder / source / name)
        answers_or_refuses(ALIGN[source], folder)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("text.txt", lambda folder: align(folder, as_json=True, file="text.txt")),
        ("lines.jsonl", lambda folder: align(folder, jsonl="lines.jsonl")),
        ("chat.json", lambda folder: align(folder, chat="chat.json")),
        ("prompts.jsonl", lambda folder: load_prompts(folder / "prompts.jsonl")),
        ("run.yaml", lambda folder: Config.load(folder / "run.yaml")),
    ],
)
def test_a_text_or_configuration_that_is_no_such_file(
    base: Path, tmp_path: Path, name: str, does: Callable[[Path], Any]
) -> None:
    assert answers_or_refuses(does, base)
    for mutate in FILES.values():
        folder = fresh(base, tmp_path / "broken")
        mutate(folder / name)
        answers_or_refuses(does, folder)


def pair(folder: Path) -> None:
    diagnose(str(folder / "student"), str(folder / "teacher"))


def every(step: int) -> Any:
    """Of all places and values of a file these many are tried each time, and all of them where time does not matter."""
    return pytest.mark.parametrize("step", [step, pytest.param(1, marks=pytest.mark.slow)])


@every(11)
@pytest.mark.parametrize(
    ("file", "does"),
    [
        *((f"student/{name}", lambda folder: align(folder, chat="chat.json")) for name in SETTINGS),
        ("student/tokenizer.json", align),
        ("older/tokenizer_config.json", ALIGN["older"]),
        ("tekken/tekken.json", ALIGN["tekken"]),
        ("chat.json", lambda folder: align(folder, chat="chat.json")),
        ("lines.jsonl", lambda folder: align(folder, jsonl="lines.jsonl")),
        ("prompts.jsonl", lambda folder: load_prompts(folder / "prompts.jsonl")),
    ],
)
def test_a_value_that_no_reader_expects(
    base: Path, tmp_path: Path, file: str, does: Callable[[Path], Any], step: int
) -> None:
    folder = fresh(base, tmp_path / "broken")
    for _, text in itertools.islice(json_mutations(json.loads((base / file).read_text()), 2), 0, None, step):
        (folder / file).write_text(text)
        answers_or_refuses(does, folder)


@every(60)
def test_a_configuration_of_a_model_with_other_values(base: Path, tmp_path: Path, step: int) -> None:
    folder = fresh(base, tmp_path / "broken")
    for _, text in itertools.islice(json_mutations(CONFIG), 0, None, step):
        (folder / "student" / "config.json").write_text(text)
        answers_or_refuses(pair, folder)


@every(40)
def test_a_header_of_weights_with_other_values(base: Path, tmp_path: Path, step: int) -> None:
    folder = fresh(base, tmp_path / "broken")
    (folder / "student" / "config.json").write_text("{}")
    weights = folder / "student" / "model.safetensors"
    for length in (2**63, 2**64 - 1, 10**12, 0):
        weights.write_bytes(length.to_bytes(8, "little") + b"{}")
        answers_or_refuses(pair, folder)
    for _, text in itertools.islice(json_mutations(HEADER), 0, None, step):
        weights.write_bytes(safetensors(text))
        answers_or_refuses(pair, folder)


@every(20)
@pytest.mark.parametrize("source", ["gguf/t.gguf", "student/tokenizer.json"])
def test_bytes_that_were_changed(base: Path, tmp_path: Path, source: str, step: int) -> None:
    folder, rng = fresh(base, tmp_path / "broken"), random.Random(0)
    whole = (base / source).read_bytes()
    for _ in range(200 // step):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.choice((rng.randrange(len(data)), rng.randrange(300)))] = rng.choice(
                (0, 255, 127, 9, 8, 1)
            )
        (folder / source).write_bytes(data)
        answers_or_refuses(ALIGN[source.split("/")[0]], folder)


REPLACED: dict[str, tuple[str, Any]] = {
    "a map of characters that is none": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    "a map that points outside": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9hYmMA"},
    ),
    "doubling": (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60,
        },
    ),
    "pieces of no length": ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    "backtracking": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    ),
    "a frame without its token": (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_the_library_panics_of_is_one_line_that_names_the_file(
    base: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    part, value = REPLACED[name]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(json.loads(byte_level_bpe().to_str()) | {part: value}))
    with pytest.raises(GoldError, match=r"t\.json"):
        run_align("a" * 40 + "!", student=str(path), teacher=str(base / "other.json"), stream=io.StringIO())
    if name != "backtracking":  # of this text alone, when the tokenizer is long known to be good
        assert capfd.readouterr().err == ""


def test_ids_without_measure_are_refused(base: Path, tmp_path: Path) -> None:
    described = json.loads(byte_level_bpe().to_str())
    described["model"]["vocab"]["zzzz"] = 4 * 10**9
    (tmp_path / "t.json").write_text(json.dumps(described))
    with pytest.raises(GoldError, match=r"4,000,000,000"):
        run_align(
            "a", student=str(tmp_path / "t.json"), teacher=str(base / "other.json"), stream=io.StringIO()
        )


def test_limits_and_padding_in_a_file_change_no_text(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tmp_path / "t.json"))
    outs = []
    for source in (tmp_path / "t.json", base / "student" / "tokenizer.json"):
        out = io.StringIO()
        run_align(
            "a text of it", student=str(source), teacher=str(base / "other.json"), as_json=True, stream=out
        )
        outs.append(json.loads(out.getvalue())["student"]["ids"])
    assert outs[0] == outs[1]


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_are_no_program(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base / "student", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    with pytest.raises(GoldError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_a_page_escapes_names_tokens_and_texts(base: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    folder = tmp_path / "<script>alert(3)<"
    folder.mkdir()
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens([evil])
    tokenizer.save(str(folder / "t.json"))
    sizes = tokenizer.get_vocab_size()
    shown = {"text": (evil, None), "ids": (None, f"1 {sizes - 1} 2")}
    for text, ids in shown.values():
        page = tmp_path / "page.html"
        run_align(
            text,
            ids=ids,
            student=str(folder / "t.json"),
            teacher=str(base / "other.json"),
            html=page,
            stream=io.StringIO(),
        )
        content = page.read_text("utf-8")
        assert "<img" not in content
        assert content.count("<script") == 2
        assert content.count("</script>") == 2
        assert "alert(3)<" not in content


@pytest.mark.parametrize("ids", [-5, 10**20, 1.5, "abc", [[1]], [True], {"a": 1}, float("inf")])
def test_a_stop_id_that_no_token_can_have(base: Path, tmp_path: Path, ids: Any) -> None:
    folder = fresh(base, tmp_path / "broken")
    (folder / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(GoldError, match=r"generation_config\.json: eos_token_id has"):
        align(folder)
    with pytest.raises(GoldError, match="the id of a stop, BOS or pad token is"):
        open_source(str(base / "older"), stop_ids=ids if isinstance(ids, list) else [ids])


def test_a_model_whose_weights_are_a_pipe(base: Path, tmp_path: Path) -> None:
    folder = fresh(base, tmp_path / "broken")
    FILES["a pipe"](folder / "student" / "model.safetensors")
    with pytest.raises(GoldError, match="weights"):
        load_model(folder / "student")


def test_a_kept_map_that_is_a_pipe_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path))
    made = np.arange(3, dtype=np.int32)
    assert cached_ids("content", 3, lambda: made) is made
    (kept,) = tmp_path.iterdir()
    assert cached_ids("content", 3, lambda: made[:0]).tolist() == [0, 1, 2]
    FILES["a pipe"](kept)
    assert cached_ids("content", 3, lambda: made) is made


def test_a_model_whose_tokenizer_makes_the_library_panic(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = fresh(base, tmp_path / "broken") / "student"
    part, value = REPLACED["a map of characters that is none"]
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(byte_level_bpe().to_str()) | {part: value}))
    with pytest.raises(GoldError, match="student: its tokenizer could not be loaded"):
        load_model(folder)
    assert "panicked" not in capfd.readouterr().err
