"""Checks of a model's files before any weight is read: complete, and of a causal language model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gold.errors import ModelError
from gold.files import ADAPTER_CONFIG, adapter_base, json_value, read_json_object
from gold.hub_names import fault_line, split_revision

_HEADS = re.compile(
    r"For(Sequence|Token|Text|Image|Audio)?(Classification|Scoring|Reward\w*)$|Reward|"
    r"For(QuestionAnswering|MultipleChoice|NextSentencePrediction)$|Value(Head|Model)|DoubleHeads"
)
_ENCODER_ONLY = re.compile(
    r"^(albert|bert|camembert|convbert|deberta(-v2)?|distilbert|electra|ernie|esm|eurobert|funnel|ibert|layoutlm\w*|"
    r"megatron-bert|modernbert|mpnet|nomic_bert|nystromformer|rembert|roberta(-prelayernorm)?|roformer|squeezebert|"
    r"xlm-roberta(-xl)?|xmod|yoso)$"
)
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The weights of a folder of adapters, as peft names them."""
_LONGEST_HEADER = 2**30
"""Bytes; the longest headers of real files have a few million."""


def check_files(path: str | Path, *, gguf_file: str | None = None) -> None:
    """Checks that a folder holds the complete files of a causal language model, or that the Hub has the name, and its
    revision in ``ID@revision``.

    A path that ends in ``.gguf`` is the file itself. Of a folder of adapters its base model is checked too.

    Raises:
        ModelError: a folder that is missing, without configuration or weights, with truncated weights, or with a model
            of another kind; a name that is neither a folder nor on the Hub, or gated there, or without that revision.
    """
    path, gguf_file = folder_and_file(path, gguf_file)
    folder = Path(path)
    name, revision = split_revision(path)
    if folder.exists() or path.startswith((".", "/", "~")) or name.count("/") > 1:
        _check_folder(folder, gguf_file)
    else:
        _check_hub(name, revision)


def check_kind(path: str | Path) -> None:
    """Checks with config.json that a folder, or the base model of its adapters, is a causal language model, if present.

    Raises:
        ModelError: adapters that name no base model, an encoder-decoder, an encoder, a classifier or reward model, a
            model of images or sound; the message says what to give instead. A configuration that cannot be read.
    """
    folder = Path(os.path.expanduser(path))
    if (base := adapter_base(folder, ModelError)) is not None:
        with _as_base_of(folder, base):
            check_kind(base)
        return
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    is_causal = _CAUSAL.search(architecture) is not None
    many_modes = any(part in config for part in ("vision_config", "audio_config"))
    conditional = architecture.endswith("ForConditionalGeneration")
    if _HEADS.search(architecture):
        what = "a classifier or reward model, which has no output matrix over tokens"
        remedy = "give the language model that it was made from"
    elif many_modes and not _reads_text(kind):
        what = "a model of images or sound, which transformers does not load as a causal language model"
        remedy = "give a model of text alone, such as the one that it was made from"
    elif not many_modes and not is_causal and (config.get("is_encoder_decoder") is True or conditional):
        what = "an encoder-decoder, which reads prompt and completion in two places"
        remedy = "give a decoder-only (causal) language model"
    elif (_ENCODER_ONLY.search(kind) and not is_causal) or architecture.endswith("ForMaskedLM"):
        what = "an encoder, which attends to the tokens that it would have to predict"
        remedy = "give a decoder-only (causal) language model"
    else:
        return
    raise ModelError(f"model {folder}: it is {what} ({architecture or kind}); {remedy}")


def hub_adapter_base(name: str) -> str | None:
    """The location of the base model of adapters on the Hub; None for a model, or if the Hub cannot be asked.

    Raises:
        ModelError: their settings cannot be read.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(name).exists():
        return None
    try:
        repository, revision = split_revision(name)
        if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
            return None
        file = hf_hub_download(repository, ADAPTER_CONFIG, revision=revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError):
        return None
    return adapter_base(Path(file).parent, ModelError)


@contextlib.contextmanager
def _as_base_of(folder: Path, base: str) -> Iterator[None]:
    """Says of an error about a base model whose base it is."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"model {folder}: its base model: {str(error).removeprefix('model ')} (correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG} if it has moved)"
        ) from error


def check_own_code(path: str | Path) -> None:
    """Rejects a config.json that names attention code on the Hub.

    Code in the folder (``auto_map``) needs no check: transformers runs it only with ``trust_remote_code``.

    Raises:
        ModelError: it names such code.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        value = config.get(name)
        for code in value.values() if isinstance(value, dict) else [value]:
            if isinstance(code, str) and "/" in code:
                raise ModelError(
                    f"model {folder}: {name} in its config.json is {code!r}, code on the Hub, which gold does not run "
                    "by default: read it, and allow it with trust_remote_code: true, or remove the key"
                )


def check_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids under the key ``name`` of a configuration: one, a list or none.

    Raises:
        ModelError: something else.
    """
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    least = 0 if name == "eos_token_id" else -1  # older files use -1 for no padding
    wrong = [i for i in ids if type(i) is not int or not least <= i < 2**31]
    if wrong or (isinstance(value, list | tuple) and name != "eos_token_id"):
        shown = repr(value)
        raise ModelError(
            f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}, which is no token id; correct the file"
        )
    return tuple(ids)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The object in a folder's config.json.

    Raises:
        ModelError: it cannot be read, or is no JSON object.
    """
    return read_json_object(folder / "config.json", ModelError)


def folder_and_file(path: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """A model's folder or Hub id, and the name of its GGUF file; ``path`` may be that of the file itself."""
    name = os.path.expanduser(path)
    if gguf_file is None and name.endswith(".gguf"):
        return os.path.dirname(name) or ".", os.path.basename(name)
    return name, gguf_file


def _reads_text(kind: str) -> bool:
    """True if transformers can also load this multimodal kind as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if not folder.is_dir():
        raise ModelError(f"model {folder}: no such folder; give a folder in Hugging Face format or a Hub id")
    if gguf_file:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"model {folder}: no file {gguf_file} in it")
        return
    if (base := adapter_base(folder, ModelError)) is not None:
        if not any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_model.bin")):
            raise ModelError(
                f"model {folder}: no {ADAPTER_WEIGHTS} in it; the adapters for {base} are missing"
            )
        if (folder / ADAPTER_WEIGHTS).is_file():
            _check_safetensors(folder, folder / ADAPTER_WEIGHTS)
        with _as_base_of(folder, base):
            check_files(base)
        return
    check_kind(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {folder}: no config.json in it; is it a folder in Hugging Face format?")
    for settings in ("config.json", "generation_config.json"):
        file = folder / settings
        content = read_json_object(file, ModelError) if file.is_file() else {}
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            try:
                check_ids(name, content.get(name))
            except ModelError as error:
                raise ModelError(f"model {folder}: {settings}: {error}") from None
    patterns = ("*.safetensors", "pytorch_model*.bin")
    weights = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    if not weights:
        raise ModelError(f"model {folder}: no weights in it, neither {' nor '.join(patterns)}")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_safetensors(folder, file)


def _check_safetensors(folder: Path, file: Path) -> None:
    """Compares the file's size with its header, which detects an interrupted copy or download without reading it."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or 8 + length > size or length > _LONGEST_HEADER:
                raise ValueError("it ends within its header")
            entries = json_value(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if not all(type(end) is int for end in ends):
            raise ValueError("an offset in its header is no whole number")
        if 8 + length + max(ends, default=0) != size:
            raise ValueError(f"it has {size} bytes, its header lists {8 + length + max(ends, default=0)}")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, MemoryError) as error:
        raise ModelError(
            f"model {folder}: {file.name} is broken, {first_line(error)}; fetch the model again"
        ) from error


def _check_hub(name: str, revision: str | None) -> None:
    """Queries the name once: without a network, a query for each file would take a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            api = HfApi()
            info = api.model_info(name, revision=revision, timeout=10)
            if getattr(info, "gated", False):
                api.auth_check(name)  # its description is public, its files are not
    except Exception as error:  # the Hub client raises many types
        raise ModelError(f"model {name}: {fault_line(name, revision, error)}") from error


def first_line(error: BaseException) -> str:
    """An error's message as one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
