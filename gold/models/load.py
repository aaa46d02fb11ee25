"""Loads causal language models from a folder, the Hub or a GGUF file; saves them. Only this module loads weights."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from gold.errors import GoldError, ModelError
from gold.files import adapter_base, read_json_object
from gold.models.adapters import (
    check_adapters,
    is_adapted,
    load_adapters,
    merged_model,
)
from gold.models.files import (
    check_files,
    check_ids,
    check_own_code,
    first_line,
    folder_and_file,
    hub_adapter_base,
)
from gold.models.language_model import LanguageModel, output_width, pad_id
from gold.models.probe import examine
from gold.models.quantization import check_installed, keep_gradients, loading_arguments, quantization_of
from gold.tokenize.foreign import foreign
from gold.tokenize.load import has_tokenizer, open_source
from gold.tokenize.roles import Roles
from gold.tokenize.templates import Rendering, check_arguments
from gold.tokenize.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Settings beside a tokenizer, of models that read images or sound too.
_PROCESSORS = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
_QUIETLY = {
    f"_raise_exceptions_for_{fault}": False
    for fault in ("missing_entries", "connection_errors", "gated_repo")
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}


def load_model(
    path: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: str | None = None,
    roles: Roles | None = None,
    trust_remote_code: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal model and its tokenizer from a folder in Hugging Face format, a Hub id, a GGUF file, or a folder of
    adapters, with which comes the base model that it names.

    ``dtype``: ``auto`` keeps the checkpoint's, but uses float32 on a CPU without 16-bit arithmetic, where 16-bit types
    would be many times slower; a model from a GGUF file is dequantized to it and saves like any other. ``device``:
    ``auto`` is the GPU if there is one. ``quantization``: ``nf4`` or ``int8`` holds the layers' matrices in 4 or 8 bits
    (``gold.models.quantization``). ``roles``: special tokens that replace those of the files (``wrap_model``).
    ``trust_remote_code``: allow code that comes with the model to run. ``template_kwargs``: arguments of its chat
    template, such as ``{"enable_thinking": False}`` for Qwen3.

    Raises:
        ModelError: a folder that is missing or broken, weights that cannot be read or are incomplete, a model whose
            logits are not its output matrix applied to its last hidden states.
        VocabularyError: a tokenizer whose tokens are not bytes, or that lacks a token named in ``roles``.
    """
    check_arguments(template_kwargs or {})
    check_files(path, gguf_file=gguf_file)
    name, given = str(path), os.path.expanduser(path)
    base = adapter_base(given, ModelError) or hub_adapter_base(given)
    path, gguf_file = folder_and_file(path if base is None else base, gguf_file)
    name = path if base is None else name
    where = f"model {path}" + (f" (file {gguf_file})" if gguf_file else "")
    target = pick_device(device)
    if dtype not in DTYPES and dtype != "auto":
        raise ModelError(f"{where}: unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    if not trust_remote_code:
        check_own_code(path)
    files = path if base is None or not has_tokenizer(given) else given
    tokenizer = _load_tokenizer(files, gguf_file, trust_remote_code, f"{where}: its tokenizer")
    if roles is not None:
        open_source(tokenizer, roles=roles)  # before the weights: a token of that name may not exist
    slow = dtype == "auto" and target.type == "cpu" and not cpu_has_bf16()
    if quantization is not None:
        lm = _load_quantized(
            path, quantization, "float32" if slow else dtype, target, trust_remote_code, where
        )
    else:
        lm = _load_lm(path, gguf_file, DTYPES.get(dtype, "auto"), trust_remote_code, where)
        if quantization_of(lm) is None:
            lm.to(target)
            if slow:
                lm.float()
    lm = lm if base is None else load_adapters(lm, given, base, name)
    lm.eval()
    wrapped = wrap_model(lm, tokenizer, name=name, roles=roles, template_kwargs=template_kwargs)
    saved = None if gguf_file else _saved_dtype(path, trust_remote_code, where)
    return replace(wrapped, saved_dtype=saved)


def wrap_model(
    lm: Any,
    tokenizer: Any,
    *,
    name: str = "model",
    roles: Roles | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A ``LanguageModel`` from a model and a tokenizer in memory.

    ``roles`` are set on both, so that they are saved with them: the stop ids in the generation settings, BOS as the
    token before plain texts.

    Raises:
        ModelError: as for ``load_model``.
    """
    check_adapters(lm, name)
    if quantization_of(lm):
        keep_gradients(lm)
    vocabulary = Vocabulary.load(tokenizer, stop_ids=_stop_ids(lm, name), roles=roles)
    if roles is not None:
        _set_roles(lm, tokenizer, vocabulary, roles)
    if not vocabulary.stop_ids:
        raise ModelError(
            f"model {name}: no stop id found in its tokenizer or generation settings; set an EOS token"
        )
    if getattr(lm.config, "rescale_every", 0):
        lm.config.rescale_every = 0  # RWKV would halve its own weights in eval mode
    rows = output_width(lm)
    # Special ids beyond the matrix are harmless: Gemma's text models include an image token without a row.
    if not vocabulary.is_special[rows:].all():
        raise ModelError(
            f"model {name}: its tokenizer has {vocabulary.size} ids, its output matrix {rows} rows; "
            "the tokenizer does not belong to these weights, or the embeddings were never resized"
        )
    generates, fault = examine(lm, name, pad_id(tokenizer, vocabulary))
    rendering = Rendering(dict(template_kwargs or {}))
    return LanguageModel(
        name, lm, tokenizer, vocabulary.with_markers(rows), generates, fault, rendering=rendering
    )


def save_model(
    model: LanguageModel,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes weights, configuration and tokenizer in plain Hugging Face format, loadable by transformers alone.

    Adapters are merged into the weights (``adapters.MergedWeights``). ``weights``: a state dict in place of the model's
    own. ``dtype``: that of the file's weights, ``rounded`` to it; default: that in memory.
    """
    lm = merged_model(model.lm) if is_adapted(model.lm) else model.lm
    given = None if weights is None else dict(weights)
    if dtype is not None:
        given = rounded(lm, lm.state_dict() if given is None else given, dtype)
    with _no_progress_bars():
        lm.save_pretrained(folder, safe_serialization=True, state_dict=given)
    if dtype is not None:
        _name_dtype(folder / "config.json", dtype)
    model.tokenizer.save_pretrained(folder)


def rounded(lm: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of a model in main memory, its parameters rounded to a dtype; tied ones stay tied.

    Buffers keep their dtype, as do parameters that the architecture keeps in float32.
    """
    kept = {*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())}
    parameters = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    done: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in weights.items():
        rounds = name in parameters and tensor.is_floating_point() and not kept & set(name.split("."))
        place = tensor.data_ptr(), tensor.shape
        if place not in done:
            done[place] = tensor.detach().to("cpu", dtype if rounds else tensor.dtype)
        found[name] = done[place]
    return found


def file_dtype(model: LanguageModel) -> torch.dtype | None:
    """The dtype of the files that a model was loaded from, if it is narrower than the one in memory."""
    saved = model.saved_dtype
    return saved if saved is not None and saved.itemsize < model.lm.dtype.itemsize else None


def copy_processors(model: LanguageModel, folder: Path) -> None:
    """Copies the settings of processors of images and sound, which a model of several kinds of input has beside its
    tokenizer, from the folder that it was loaded from, or from the Hub."""
    config = model.lm.config
    if not any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        return
    for name in _PROCESSORS:
        if (file := cached_file(model.lm.name_or_path, name, **_QUIETLY)) is not None:
            shutil.copy(file, folder / name)


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Names the dtype of the weights in a config.json, in which transformers has put that of the model in memory."""
    config = dict(read_json_object(file, ModelError))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_weights(
    model: LanguageModel, folder: Path, part: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Copies the weights saved in ``folder`` into the model in memory, bit for bit.

    ``part(saved, own)`` is the part of a saved tensor that belongs into the model's own.

    Raises:
        ModelError: they cannot be read, or belong to another architecture.
    """
    own = next(model.lm.parameters())
    try:
        with _no_progress_bars():
            # Uses the model's own class, so that nothing in the folder decides which code runs.
            saved = type(model.lm).from_pretrained(folder, dtype=own.dtype, trust_remote_code=False)
        state = saved.state_dict()
        if part is not None:
            held = model.lm.state_dict()
            state = {
                name: part(value, held[name]) if name in held else value for name, value in state.items()
            }
        model.lm.load_state_dict(state)
    except Exception as error:
        raise ModelError(f"model {folder}: its weights could not be loaded: {first_line(error)}") from error


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU if there is one.

    Raises:
        ModelError: a device that this machine does not have.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"unknown device {name!r}; choose auto, cpu, or cuda") from error
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if device.type in available and not available[device.type]():
        raise ModelError(f"device {name!r}: torch sees no GPU on this machine; choose cpu or auto")
    return device


def cpu_has_bf16() -> bool:
    """True if this processor has bfloat16 arithmetic; otherwise torch converts every number first."""
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def gguf_tokenizer(path: str | Path, file: str) -> Any:
    """The Hugging Face tokenizer of a GGUF file in a folder or a Hub repository.

    It does not use transformers' own reader, which ignores the name of the pre-tokenizer: SmolLM's digits would not be
    split.

    Raises:
        VocabularyError: a file that is broken, or whose tokenizer is unknown.
    """
    from huggingface_hub import hf_hub_download

    folder = Path(path)
    found = open_source(folder / file if folder.is_dir() else hf_hub_download(str(path), file))
    ids = {"bos_token": found.bos_id, "eos_token": (*found.stop_ids, None)[0], "pad_token": found.pad_id}
    named = {role: found.tokenizer.id_to_token(index) for role, index in ids.items() if index is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=found.tokenizer,
        name_or_path=found.name,
        clean_up_tokenization_spaces=False,
        unk_token=getattr(found.tokenizer.model, "unk_token", None),
        **named,
    )
    tokenizer.chat_template = found.chat_template
    return tokenizer


def _load_tokenizer(path: str, gguf_file: str | None, trust_remote_code: bool, what: str) -> Any:
    with _as_model_error(what):
        if gguf_file:
            return gguf_tokenizer(path, gguf_file)
        with foreign(f"{what} could not be loaded"):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _load_quantized(
    path: str, kind: str, dtype: str, device: torch.device, trust_remote_code: bool, where: str
) -> Any:
    """The transformers model with quantized layers, on ``device``."""
    check_installed(kind)
    if path.endswith(".gguf"):
        raise ModelError(f"{where}: weights of a GGUF file have their own quantization; leave {kind} out")
    found = DTYPES.get(dtype) or _saved_dtype(path, trust_remote_code, where) or torch.float32
    return _load_lm(path, None, found, trust_remote_code, where, loading_arguments(kind, found, device))


def _saved_dtype(path: str, trust_remote_code: bool, where: str) -> torch.dtype | None:
    """The dtype of the weights in a model's files, as its config.json names it; None if it names none."""
    with _as_model_error(where):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    saved = config.dtype or config.get_text_config().dtype
    return saved if isinstance(saved, torch.dtype) else DTYPES.get(str(saved))


def _load_lm(
    path: str, gguf_file: str | None, dtype: Any, trust_remote_code: bool, where: str,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:  # fmt: skip
    """The transformers model with all its weights, on the CPU unless ``options`` name another device."""
    # A download takes minutes and shows its progress; a folder loads in a moment.
    bars = _no_progress_bars() if Path(path).is_dir() else contextlib.nullcontext()
    with _as_model_error(where), _no_loading_report(), bars:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, by name
            trust_remote_code=trust_remote_code,
            **({"gguf_file": gguf_file} if gguf_file else {}),
            **options,
        )
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):
        head = {name for name, module in lm.named_modules() if module is lm.get_output_embeddings()}
        if {key.rpartition(".")[0] for key in missing} <= head:
            saved = ", ".join(lm.config.architectures or ())
            raise ModelError(
                f"{where}: it was saved without its output matrix ({saved}), as embedding models are; give the "
                "language model that it was made from"
            )
        raise ModelError(
            f"{where}: {len(missing)} of its weights are not in its files, such as {missing[0]}; fetch the model again"
        )
    if other := sorted(entry[0] for entry in report["mismatched_keys"]):
        raise ModelError(
            f"{where}: {len(other)} of its weights have another shape than its config.json says, such as {other[0]}; "
            "weights and config.json do not belong together"
        )
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("%s: %d weights in its files are not used, such as %s", where, len(unused), unused[0])
    if gguf_file:
        _forget_quantizer(lm)
    return lm


@contextlib.contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Converts errors of transformers to one line."""
    try:
        yield
    except GoldError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what} needs code that comes with it, which gold does not run by default: read that code, then allow "
                "it with trust_remote_code: true beside the model's path"
            ) from error
        raise ModelError(f"{what} could not be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def _no_loading_report() -> Iterator[None]:
    """Suppresses transformers' tables of mismatched weights, which become one line here."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    # The GGUF reader has a separate progress bar, which that setting does not affect.
    reader: Any = modeling_gguf_pytorch_utils
    bar, reader.tqdm = reader.tqdm, lambda given, **_: given
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            hf_logging.enable_progress_bar()


def _forget_quantizer(lm: Any) -> None:
    """Removes the GGUF attributes of a dequantized model, which transformers would refuse to save."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(lm, name):
            delattr(lm, name)
    lm.is_quantized = False
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config


def _set_roles(lm: Any, tokenizer: Any, vocabulary: Vocabulary, roles: Roles) -> None:
    if roles.stop is not None and getattr(lm, "generation_config", None) is not None:
        lm.generation_config.eos_token_id = list(vocabulary.stop_ids)
    if roles.bos is not None:
        tokenizer.bos_token = roles.bos
        tokenizer.add_bos_token = True
    if roles.pad is not None:
        tokenizer.pad_token = roles.pad


def _stop_ids(lm: Any, name: str) -> tuple[int, ...]:
    """The stop ids in the checkpoint's generation settings, else in its configuration."""
    for config in (getattr(lm, "generation_config", None), lm.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            try:
                return check_ids("eos_token_id", ids)
            except ModelError as error:
                raise ModelError(f"model {name}: {error}") from None
    return ()
