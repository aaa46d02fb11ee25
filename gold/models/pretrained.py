"""Transformers models from folders, the Hub and GGUF files: their weights, whole and on their devices."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

from gold.errors import GoldError, ModelError
from gold.hub_names import split_revision
from gold.models.files import first_line
from gold.models.first_process import is_first
from gold.models.quantization import check_installed, loading_arguments, quantization_of

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}


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


def placed_model(
    path: str,
    gguf_file: str | None,
    quantization: str | None,
    dtype: str,
    target: torch.device,
    options: Mapping[str, Any],
    where: str,
    in_shards: bool = False,
) -> Any:
    """The transformers model on ``target``, or where its device map says. ``in_shards``: until it is sharded, in main
    memory of the first process, and without contents in the others."""
    slow = dtype == "auto" and target.type == "cpu" and not cpu_has_bf16()
    if in_shards:
        target = torch.device("cpu" if is_first() else "meta")
    if quantization is not None:
        lm = _load_quantized(path, quantization, "float32" if slow else dtype, target, options, where)
    else:
        read = options if target.type != "meta" else {**options, "device_map": "meta"}
        lm = _load_lm(path, gguf_file, DTYPES.get(dtype, "auto"), read, where)
        if quantization_of(lm) is None:
            if "device_map" not in read:
                lm.to(target)
            if slow:
                lm.float()
    if "device_map" in options:
        _check_spread(lm, where)
    return lm


def loading_options(
    trust_remote_code: bool, attn_implementation: str | None, device_map: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    check_attention(attn_implementation, trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    return options


def repository(path: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a folder, or for a Hub id and its revision."""
    name, revision = split_revision(path)
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


def check_attention(name: str | None, trust_remote_code: bool) -> None:
    """Checks that an implementation of attention is no code on the Hub, unless that is allowed to run.

    Raises:
        ModelError: it is.
    """
    if name is not None and "/" in name and not trust_remote_code:
        raise ModelError(
            f"attn_implementation {name} is code on the Hub, which gold does not run by default: read it, and allow it "
            "with trust_remote_code: true, or name another"
        )


def runs_on_cpu(attn_implementation: str | None) -> bool:
    """Whether a model can be tried on a CPU: other kernels of attention than torch's need a GPU."""
    return attn_implementation in (None, "eager", "sdpa")


def check_dtype(dtype: str, where: str) -> None:
    """Checks the name of a dtype.

    Raises:
        ModelError: an unknown one.
    """
    if dtype not in DTYPES and dtype != "auto":
        raise ModelError(f"{where}: unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")


def _check_spread(lm: Any, where: str) -> None:
    """Checks that all weights of a model with a device map are in memory that is computed in."""
    places = {str(device) for device in getattr(lm, "hf_device_map", {}).values()}
    if away := sorted(
        places & {"disk", "meta"} | (places & {"cpu"} if places - {"cpu", "disk", "meta"} else set())
    ):
        raise ModelError(
            f"{where}: its device map leaves layers on {' and '.join(away)}, since all of them do not fit on the GPUs; "
            "use quantization, a server (served), or more GPUs"
        )


def _load_quantized(
    path: str, kind: str, dtype: str, device: torch.device, options: Mapping[str, Any], where: str
) -> Any:
    """The transformers model with quantized layers, on ``device`` or as its device map says."""
    check_installed(kind)
    if path.endswith(".gguf"):
        raise ModelError(f"{where}: weights of a GGUF file have their own quantization; leave {kind} out")
    found = DTYPES.get(dtype) or saved_dtype(path, options["trust_remote_code"], where) or torch.float32
    return _load_lm(path, None, found, {**loading_arguments(kind, found, device), **options}, where)


def saved_dtype(path: str, trust_remote_code: bool, where: str) -> torch.dtype | None:
    """The dtype of the weights in a model's files, as its config.json names it; None if it names none."""
    with as_model_error(where):
        config = AutoConfig.from_pretrained(**repository(path), trust_remote_code=trust_remote_code)
    saved = config.dtype or config.get_text_config().dtype
    return saved if isinstance(saved, torch.dtype) else DTYPES.get(str(saved))


def _load_lm(path: str, gguf_file: str | None, dtype: Any, options: Mapping[str, Any], where: str) -> Any:
    """The transformers model with all its weights, on the CPU unless ``options`` name another device."""
    # A download takes minutes and shows its progress; a folder loads in a moment.
    bars = no_progress_bars() if Path(path).is_dir() else contextlib.nullcontext()
    with as_model_error(where), _no_loading_report(), bars:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **repository(path),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # rejected below, by name
            trust_remote_code=options["trust_remote_code"],
            **({"gguf_file": gguf_file} if gguf_file else {}),
            **{name: value for name, value in options.items() if name != "trust_remote_code"},
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
def as_model_error(what: str) -> Iterator[None]:
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
def no_progress_bars() -> Iterator[None]:
    """Suppresses the progress bars of transformers and of its GGUF reader."""
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
