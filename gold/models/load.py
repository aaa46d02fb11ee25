"""Loads causal language models from a folder, the Hub or a GGUF file; saves them. Only this module loads weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import cached_file

from gold.errors import ModelError
from gold.files import adapter_base, read_json_object
from gold.hub_names import split_revision, with_revision
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
from gold.models.first_process import first_then_others, from_first
from gold.models.language_model import LanguageModel, output_width, pad_id
from gold.models.pretrained import (
    as_model_error,
    check_dtype,
    loading_options,
    no_progress_bars,
    pick_device,
    placed_model,
    repository,
    runs_on_cpu,
    saved_dtype,
)
from gold.models.probe import examine
from gold.models.quantization import keep_gradients, quantization_of
from gold.models.rounding import rounded
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


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    roles: Roles | None = None,
    trust_remote_code: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    in_shards: bool = False,
) -> LanguageModel:
    """A causal model and its tokenizer from a folder in Hugging Face format, a Hub id, a GGUF file, or a folder of
    adapters, with which comes the base model that it names.

    ``revision``: commit, tag or branch of a Hub id, which can also be written as ``ID@revision``. ``dtype``: ``auto``
    keeps the checkpoint's, but uses float32 on a CPU without 16-bit arithmetic, where 16-bit types would be many times
    slower; a model from a GGUF file is dequantized to it and saves like any other. ``device``: ``auto`` is the GPU if
    there is one. ``device_map`` instead spreads the layers of a model that is not trained over the GPUs of this
    process: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``, or devices by module, as in transformers.
    ``attn_implementation``: ``eager``, ``sdpa``, ``flash_attention_2``, … as in transformers; None: its choice.
    ``quantization``: ``nf4`` or ``int8`` holds the layers' matrices in 4 or 8 bits (``gold.models.quantization``).
    ``roles``: special tokens that replace those of the files (``wrap_model``). ``trust_remote_code``: allow code that
    comes with the model to run. ``template_kwargs``: arguments of its chat template, such as
    ``{"enable_thinking": False}`` for Qwen3. ``in_shards``: the model is to be sharded over the processes of a run;
    where that can be, the first alone reads and tries its weights, in main memory (``LanguageModel.shards_on``).

    Raises:
        ModelError: a folder that is missing or broken, weights that cannot be read or are incomplete, a model whose
            logits are not its output matrix applied to its last hidden states.
        VocabularyError: a tokenizer whose tokens are not bytes, or that lacks a token named in ``roles``.
    """
    check_arguments(template_kwargs or {})
    path = with_revision(str(path), revision)
    check_files(path, gguf_file=gguf_file)
    name, given = path, os.path.expanduser(path)
    base = adapter_base(given, ModelError) or hub_adapter_base(given)
    path, gguf_file = folder_and_file(path if base is None else base, gguf_file)
    name = path if base is None else name
    where = f"model {path}" + (f" (file {gguf_file})" if gguf_file else "")
    target = pick_device(device)
    options = loading_options(trust_remote_code, attn_implementation, device_map)
    check_dtype(dtype, where)
    if not trust_remote_code:
        check_own_code(path)
    files = path if base is None or not has_tokenizer(given) else given
    tokenizer = _load_tokenizer(files, gguf_file, trust_remote_code, f"{where}: its tokenizer")
    if roles is not None:
        open_source(tokenizer, roles=roles)  # before the weights: a token of that name may not exist
    in_shards = in_shards and runs_on_cpu(attn_implementation)
    in_shards = in_shards and not (base or gguf_file or quantization or device_map)
    place = partial(placed_model, path, gguf_file, quantization, dtype, target, options, where, in_shards)
    lm = first_then_others(place) if in_shards else place()
    lm = lm if base is None else load_adapters(lm, given, base, name)
    wrapped = _wrapped(lm.eval(), tokenizer, name, roles, template_kwargs, in_shards)
    saved = None if gguf_file else saved_dtype(path, trust_remote_code, where)
    return replace(wrapped, saved_dtype=saved, shards_on=target if in_shards else None)


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
    return _wrapped(lm, tokenizer, name, roles, template_kwargs)


def _wrapped(
    lm: Any,
    tokenizer: Any,
    name: str,
    roles: Roles | None,
    template_kwargs: Mapping[str, Any] | None,
    in_shards: bool = False,
) -> LanguageModel:
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
    trial = partial(examine, lm, name, pad_id(tokenizer, vocabulary))
    generates, fault = from_first(trial) if in_shards else trial()
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
    with no_progress_bars():
        lm.save_pretrained(folder, safe_serialization=True, state_dict=given)
    if dtype is not None:
        _name_dtype(folder / "config.json", dtype)
    model.tokenizer.save_pretrained(folder)


def copy_processors(model: LanguageModel, folder: Path) -> None:
    """Copies the settings of processors of images and sound, which a model of several kinds of input has beside its
    tokenizer, from the folder that it was loaded from, or from the Hub."""
    config = model.lm.config
    if not any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        return
    commit = getattr(config, "_commit_hash", None)  # of a model from the Hub
    for name in _PROCESSORS:
        if (file := cached_file(model.lm.name_or_path, name, revision=commit, **_QUIETLY)) is not None:
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
        with no_progress_bars():
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


def gguf_tokenizer(path: str | Path, file: str) -> Any:
    """The Hugging Face tokenizer of a GGUF file in a folder or a Hub repository.

    It does not use transformers' own reader, which ignores the name of the pre-tokenizer: SmolLM's digits would not be
    split.

    Raises:
        VocabularyError: a file that is broken, or whose tokenizer is unknown.
    """
    from huggingface_hub import hf_hub_download

    folder = Path(path)
    name, revision = split_revision(str(path))
    found = open_source(folder / file if folder.is_dir() else hf_hub_download(name, file, revision=revision))
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
    with as_model_error(what):
        if gguf_file:
            return gguf_tokenizer(path, gguf_file)
        with foreign(f"{what} could not be loaded"):
            try:
                return AutoTokenizer.from_pretrained(**repository(path), trust_remote_code=trust_remote_code)
            except Exception:
                if Path(path).is_dir() and not has_tokenizer(path):
                    open_source(path)  # its error names the files that are missing
                raise


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
