"""Causal language models from transformers: load, save, and their states along a text. The only importer of models."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from gold.data import Prompt
from gold.errors import GoldError, ModelError
from gold.kernels.logits import HeadLogits, LazyLogits, SummedWeight, leaf_of, linear
from gold.models.files import check_files, check_ids, check_own_code, first_line, folder_and_file
from gold.tokenize.chat import prompt_ids
from gold.tokenize.foreign import foreign
from gold.tokenize.load import open_source
from gold.tokenize.roles import Roles
from gold.tokenize.templates import Rendering, check_arguments
from gold.tokenize.vocabulary import Vocabulary

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


Completes = Literal["together", "one length", "one"]


@dataclass(frozen=True)
class LanguageModel:
    """A causal model, its tokenizer, and the vocabulary read from that tokenizer, stop ids from all its sources.

    In the vocabulary the markers are text (see ``gold.tokenize.markers``). ``rendering`` is what its chat template is
    given beside messages.
    """

    name: str
    lm: Any
    tokenizer: Any
    vocabulary: Vocabulary
    completes: Completes = "together"
    """Which prompts ``generate`` completes right: of several lengths "together", filled up on the left; those of "one
    length"; "one" at a time."""
    cannot_write: str | None = None
    """Why not even one prompt is completed right; None where it is."""
    rendering: Rendering = field(default_factory=Rendering, kw_only=True)

    @property
    def runs_own_code(self) -> bool:
        """Whether code from its own folder or repository runs, which somebody has allowed."""
        return any(
            type(part).__module__.startswith("transformers_modules.") for part in (self.lm, self.tokenizer)
        )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that the model reads before a completion, see ``chat.prompt_ids``."""
        return prompt_ids(self.tokenizer, prompt, self.rendering)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.lm.parameters()).device
        return device

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model was built for."""
        config = self.lm.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    @property
    def pad_id(self) -> int:
        """An id to fill batches with; what it is never matters, since attention masks it."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.vocabulary.stop_ids or (0,))[0])


def load_model(
    path: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    roles: Roles | None = None,
    trust_remote_code: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal model and its tokenizer from a folder in Hugging Face format, a Hub id, or a GGUF file.

    ``dtype``: ``auto`` keeps the checkpoint's, but on a CPU that has no arithmetic of 16 bits, where it would be many
    times slower, it is float32; a model from a GGUF file is dequantised to it and saves like any other.
    ``device``: ``auto`` is the GPU where there is one. ``roles``: special tokens in the place of those that the files
    name; see ``wrap_model``. ``trust_remote_code``: whether code that comes with the model may run; nobody is asked.
    ``template_kwargs``: what its chat template is given beside messages, such as ``{"enable_thinking": False}`` of
    Qwen3.

    Raises:
        ModelError: a folder that is missing or broken, weights that cannot be read or are not all there, a model whose
            logits are not its output matrix applied to its last hidden states.
        VocabularyError: a tokenizer that cannot be spelled in bytes, or has no token of a name in ``roles``.
    """
    check_arguments(template_kwargs or {})
    check_files(path, gguf_file=gguf_file)
    path, gguf_file = folder_and_file(path, gguf_file)
    where = f"model {path}" + (f" (file {gguf_file})" if gguf_file else "")
    target = pick_device(device)
    if dtype not in DTYPES and dtype != "auto":
        raise ModelError(f"{where}: unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    local = Path(path).is_dir()
    if not trust_remote_code:
        check_own_code(path)
    try:
        if gguf_file:
            tokenizer = gguf_tokenizer(path, gguf_file)
        else:
            with foreign(f"{where}: its tokenizer could not be loaded"):
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except GoldError:
        raise
    except Exception as error:
        raise _not_loaded(f"{where}: its tokenizer", error) from error
    if roles is not None:
        open_source(tokenizer, roles=roles)  # before the weights: a token that they name may not be there
    try:
        # A download may take minutes and shows how far it is; a folder is read in a moment.
        with _quiet_errors(), _no_bars() if local else contextlib.nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto" if dtype == "auto" else DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                trust_remote_code=trust_remote_code,
                **extra,
            )
    except Exception as error:
        raise _not_loaded(where, error) from error
    lm, report = loaded
    missing = sorted(report["missing_keys"])
    head = {name for name, module in lm.named_modules() if module is lm.get_output_embeddings()}
    if missing and {key.rpartition(".")[0] for key in missing} <= head:
        saved = ", ".join(lm.config.architectures or ())
        raise ModelError(
            f"{where}: it was saved without its output matrix ({saved}), as models of embeddings are; give the "
            "language model that it was made from"
        )
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} of its weights are not in its files, {missing[0]} for one; "
            "fetch the model again"
        )
    if other := sorted(entry[0] for entry in report["mismatched_keys"]):
        raise ModelError(
            f"{where}: {len(other)} of its weights have another shape than its config.json says, {other[0]} for one; "
            "they do not belong together"
        )
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{where}: {len(unused)} weights in its files are not used, {unused[0]} for one", stacklevel=2
        )
    if gguf_file:
        forget_quantizer(lm)
    lm.to(target)
    if dtype == "auto" and target.type == "cpu" and not cpu_has_halves():
        lm.float()
    lm.eval()
    return wrap_model(lm, tokenizer, name=str(path), roles=roles, template_kwargs=template_kwargs)


def _not_loaded(what: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{what} needs code that comes with it, which is not run unasked: read that code, and allow it with "
            "trust_remote_code: true beside the model's path"
        )
    return ModelError(f"{what} could not be loaded: {first_line(error)}")


def wrap_model(
    lm: Any,
    tokenizer: Any,
    *,
    name: str = "model",
    roles: Roles | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A ``LanguageModel`` of a model and tokenizer that are already in memory.

    What ``roles`` names is set on both, so that it is saved with them: the stop ids among the generation settings, the
    BOS as the token in front of plain texts.

    Raises:
        ModelError: as for ``load_model``.
    """
    vocabulary = Vocabulary.load(tokenizer, stop_ids=_stop_ids(lm, name), roles=roles)
    if roles is not None:
        _give_roles(lm, tokenizer, vocabulary, roles)
    if not vocabulary.stop_ids:
        raise ModelError(
            f"model {name}: no stop id found in its tokenizer or generation settings; set an EOS token"
        )
    if getattr(lm.config, "rescale_every", 0):
        lm.config.rescale_every = 0  # RWKV would halve its own weights whenever it is evaluated
    rows = output_width(lm)
    # Ids beyond the matrix can be harmless: Gemma's text models ship an image token that they have no row for.
    if not vocabulary.is_special[rows:].all():
        raise ModelError(
            f"model {name}: its tokenizer has {vocabulary.size} ids, its output matrix {rows} rows; "
            "the tokenizer does not belong to these weights, or the embeddings were never resized"
        )
    pad = tokenizer.pad_token_id
    completes, fault = _examine(lm, name, int(pad if pad is not None else vocabulary.stop_ids[0]))
    rendering = Rendering(dict(template_kwargs or {}))
    return LanguageModel(
        name, lm, tokenizer, vocabulary.with_markers(rows), completes, fault, rendering=rendering
    )


def gguf_tokenizer(path: str | Path, file: str) -> Any:
    """The Hugging Face tokenizer of a GGUF file in a folder or a Hub repository.

    Not transformers' own reading of such files, which forgets what the name of the pre-tokenizer stands for: SmolLM's
    digits would not be cut apart.

    Raises:
        VocabularyError: a file that is broken, or whose tokenizer is not known.
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


def save_model(model: LanguageModel, folder: Path) -> None:
    """Writes weights, configuration and tokenizer in plain Hugging Face format, so that transformers alone loads it."""
    with _no_bars():
        model.lm.save_pretrained(folder, safe_serialization=True)
    model.tokenizer.save_pretrained(folder)


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Puts the weights saved in ``folder`` into the model that is in memory, bit for bit.

    Raises:
        ModelError: they cannot be read, or belong to another architecture.
    """
    own = next(model.lm.parameters())
    try:
        with _no_bars():
            # Its class is known: nothing in the folder has a say in what code runs.
            saved = type(model.lm).from_pretrained(folder, dtype=own.dtype, trust_remote_code=False)
        model.lm.load_state_dict(saved.state_dict())
    except Exception as error:
        raise ModelError(f"model {folder}: its weights could not be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """Without the tables in which transformers reports weights that do not fit: that is told in one line, by whoever
    loads."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which are of no use for what takes a moment."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    # The reader of GGUF files has a bar of its own, which that setting does not reach.
    reader: Any = modeling_gguf_pytorch_utils
    bar, reader.tqdm = reader.tqdm, lambda given, **_: given
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            hf_logging.enable_progress_bar()


def cpu_has_halves() -> bool:
    """Whether this processor multiplies bfloat16 itself; else torch takes every number apart first."""
    return any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU where there is one.

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
    seen: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if device.type in seen and not seen[device.type]():
        raise ModelError(f"device {name!r}: torch sees no GPU on this machine; choose cpu or auto")
    return device


def forget_quantizer(lm: Any) -> None:
    """Removes the marks that a GGUF load leaves on a dequantised model; with them it refuses to be saved."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(lm, name):
            delattr(lm, name)
    lm.is_quantized = False
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config


def recompute_activations(lm: Any) -> None:
    """Lets the model drop the activations of its layers and make them again in the backward pass: less memory, more
    time.

    Not by transformers' own switch, which works in train mode alone, where dropout is active.

    Raises:
        ModelError: it has no layers that are known to allow that.
    """
    inside: set[nn.Module] = set()
    for layer in _plain(lm).modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            inside.update(layer.modules())
            own = layer.forward
            if not (isinstance(own, partial) and own.func is _recomputed):
                layer.forward = partial(_recomputed, own)
    if not inside:
        raise ModelError(
            f"train.gradient_checkpointing: {type(_plain(lm)).__name__} has no layers whose activations can be "
            "recomputed; set it to false"
        )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def output_width(lm: Any) -> int:
    """Number of rows of the output matrix: ids that the tokenizer lacks included."""
    return int(_plain(lm).get_output_embeddings().weight.shape[0])


def backbone(lm: Any) -> nn.Module:
    """The model below its output matrix."""
    model: Any = _plain(lm)
    module: nn.Module = model.base_model
    if module is model:  # its class names a part that it does not have, as Llama4ForCausalLM does
        return cast(nn.Module, model.model)
    return module


def as_rows(lm: Any, hidden_ND: Tensor) -> LazyLogits:
    """Last hidden states as rows whose logits are exactly what the model itself makes of them: output matrix, then its
    scale or soft cap."""
    model = _plain(lm)
    matrix = model.get_output_embeddings()
    config = model.config.get_text_config()
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next(filter(None, (getattr(config, name, None) for name in caps)), None)
    multiply = getattr(config, "logit_scale", None)
    divide = getattr(config, "logits_scaling", None)
    trained = {name: p for name, p in matrix.named_parameters() if p.requires_grad}

    def logits_of(hidden: Tensor, *weights: Tensor | SummedWeight) -> Tensor:
        given = dict(zip(trained, weights, strict=True)) if weights else {}
        if "weight" in given and type(matrix) is nn.Linear:
            return finished(linear(hidden, given["weight"], given.get("bias", matrix.bias)))
        tensors = {name: leaf_of(weight) for name, weight in given.items()}
        return finished(functional_call(matrix, tensors, (hidden,)) if given else matrix(hidden))

    def finished(logits: Tensor) -> Tensor:
        alone = None if torch.is_grad_enabled() else logits  # nobody else has it: no memory for another
        if multiply:
            logits = torch.mul(logits, multiply, out=alone)
        if divide:
            logits = torch.div(logits, divide, out=alone)
        if cap:
            logits = torch.div(logits, cap, out=alone)
            logits = torch.mul(torch.tanh(logits, out=alone), cap, out=alone)
        return logits

    def into(hidden: Tensor, room: Tensor) -> Tensor:
        across = matrix.weight.T
        if matrix.bias is None:
            return finished(torch.mm(hidden, across, out=room))
        return finished(torch.addmm(matrix.bias, hidden, across, out=room))

    def reordered(columns: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = matrix.weight[columns], None if matrix.bias is None else matrix.bias[columns]
        return lambda hidden: finished(functional.linear(hidden, weight, bias))

    # A weight that is spread over processes is whole only while its module runs.
    plain = type(matrix) is nn.Linear and not trained and not hasattr(matrix, "_hf_hook")
    here = plain and type(matrix.weight.data) is Tensor and matrix.weight.device == hidden_ND.device
    reusing = here and matrix.weight.dtype == hidden_ND.dtype and not torch.is_autocast_enabled("cpu")
    return HeadLogits(
        hidden_ND,
        logits_of,
        output_width(lm),
        weights=tuple(trained.values()),
        reordered=reordered if here else None,
        into=into if reusing and hidden_ND.device.type == "cpu" else None,
    )


class StatesModule(nn.Module):
    """A causal model whose forward pass hands its states at chosen places to a function and returns what that gives.

    The loss is computed inside ``forward``, so that wrappers which shard or reduce parameters around it see every use
    of the output matrix.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, states: PaddedStates, then: Callable[[LazyLogits], Any]) -> Any:
        """``then(rows)`` with the states of ``states``, text after text."""
        return then(rows_of(self.lm, states))


@dataclass(frozen=True)
class PaddedStates:
    """Right-padded sequences, and which of their positions are the states that predict the completions' tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    sequence: Tensor
    position: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[NDArray[np.integer[Any]]], rows: Sequence[int],
        pad_id: int, device: torch.device,
    ) -> PaddedStates:  # fmt: skip
        """States ``0 … rows[b] − 1`` of each completion: state k has read the prompt and k tokens of the completion."""
        whole = [
            np.concatenate((np.asarray(p, np.int64), c)) for p, c in zip(prompts, completions, strict=True)
        ]
        longest = max(w.size for w in whole)
        ids = np.full((len(whole), longest), pad_id, np.int64)
        mask = np.zeros((len(whole), longest), np.int64)
        for b, w in enumerate(whole):
            ids[b, : w.size] = w
            mask[b, : w.size] = 1
        sequence = np.repeat(np.arange(len(whole)), rows)
        position = np.concatenate([len(p) - 1 + np.arange(r) for p, r in zip(prompts, rows, strict=True)])
        return cls(*(torch.from_numpy(a).to(device) for a in (ids, mask, sequence, position)))


def rows_of(lm: Any, states: PaddedStates) -> LazyLogits:
    """The model's states at the chosen places, as rows whose logits are computed on demand."""
    with _bare_outputs(lm):
        output = backbone(lm)(
            input_ids=states.input_ids, attention_mask=states.attention_mask, use_cache=False
        )
    return as_rows(lm, output.last_hidden_state[states.sequence, states.position])


@contextlib.contextmanager
def _bare_outputs(lm: Any) -> Iterator[None]:
    """For the duration, the model returns its states alone, whatever its configuration wishes beside them: an auxiliary
    loss of its routers, say, which fails where a mask is longer than the tokens."""
    config = _plain(lm).config
    kept = []
    for each in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in (
            ("output_router_logits", False),
            ("output_hidden_states", False),
            ("return_dict", True),
        ):
            if getattr(each, name, value) != value:
                kept.append((each, name, getattr(each, name)))
                setattr(each, name, value)
    try:
        yield
    finally:
        for each, name, value in kept:
            setattr(each, name, value)


def generate(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    processor: LogitsProcessor,
) -> Tensor:
    """The likeliest ids after each prompt once ``processor`` has changed the logits, [B, new tokens]; prompts are
    filled up on the left.

    The model's own generation settings have no say: ``generate`` would fill whatever a call leaves unset from them,
    top-k for one.
    """
    longest = max(len(p) for p in prompts)
    ids = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt) :] = prompt
        mask[b, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    device = next(lm.parameters()).device
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        with _bare_outputs(lm):
            whole: Tensor = lm.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([processor]),
            )
    finally:
        lm.generation_config = own
    return whole[:, longest:]


def _plain(lm: Any) -> Any:
    """The transformers model inside an adapter wrapper, or the model itself."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def _give_roles(lm: Any, tokenizer: Any, vocabulary: Vocabulary, roles: Roles) -> None:
    if roles.stop is not None and getattr(lm, "generation_config", None) is not None:
        lm.generation_config.eos_token_id = list(vocabulary.stop_ids)
    if roles.bos is not None:
        tokenizer.bos_token = roles.bos
        tokenizer.add_bos_token = True
    if roles.pad is not None:
        tokenizer.pad_token = roles.pad


def _stop_ids(lm: Any, name: str) -> tuple[int, ...]:
    """Stop ids that the checkpoint's generation settings name, else its configuration."""
    for config in (getattr(lm, "generation_config", None), lm.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            try:
                return check_ids("eos_token_id", ids)
            except ModelError as error:
                raise ModelError(f"model {name}: {error}") from None
    return ()


_PROBE = 5
"""Tokens of the text that a model is tried with."""


@torch.no_grad()
def _examine(lm: Any, name: str, pad_id: int) -> tuple[Completes, str | None]:
    """How prompts can be completed, or why not: ``completes`` and ``cannot_write`` of ``LanguageModel``.

    One text of five tokens is read whole, and as rows beside its own beginning, filled up on the right: the logits must
    be the same, else the loss would train another model. Then ``generate`` is made to write it after its beginnings.

    Raises:
        ModelError: it is no causal model whose logits are its output matrix applied to its last hidden states.
    """
    model = _plain(lm)
    kind = type(model).__name__
    was_training = lm.training
    lm.eval()
    try:
        if model.get_output_embeddings() is None:
            raise ModelError(f"model {name}: it has no output matrix; gold needs a causal language model")
        # From the middle, where no special tokens are.
        width = output_width(lm)
        text = [(width // 2 + 3 * k) % width for k in range(_PROBE)]
        ids = torch.tensor([text], device=next(lm.parameters()).device)
        with _bare_outputs(lm):
            whole = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        if not whole.isfinite().all():
            raise ModelError(f"model {name}: its logits are NaN or infinite; are its weights whole?")
        near = partial(_is_near, whole, 6e-2 if lm.dtype.itemsize < 4 else 1e-3)
        short = _PROBE - 2
        states = PaddedStates.of(
            [text[:1], text[:1]],
            [np.array(text[1:]), np.array(text[1:short])],
            [_PROBE, short],
            pad_id,
            ids.device,
        )
        rows = rows_of(lm, states).logits().float()
        if not near(rows[:_PROBE], range(_PROBE)):
            raise ModelError(
                f"model {name}: its logits are not its output matrix applied to its last hidden states; this "
                f"architecture ({kind}) does something more"
            )
        if not near(rows[_PROBE:], range(short)):
            raise ModelError(
                f"model {name}: what it says of a token depends on what comes after it ({kind} is no causal model, or "
                "not set up as one: is_decoder)"
            )
        tried: dict[Completes, tuple[int, ...]] = {"together": (3, 2), "one length": (2, 2), "one": (2,)}
        fault = None
        for how, lengths in tried.items():
            if (fault := _writing_fault(lm, text, lengths, pad_id, near)) is None:
                return how, None
        return "one", fault
    except GoldError:
        raise
    except Exception as error:
        raise ModelError(
            f"model {name}: gold cannot run this architecture ({kind}): {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        lm.train(was_training)


def _writing_fault(
    lm: Any,
    text: Sequence[int],
    lengths: Sequence[int],
    pad_id: int,
    near: Callable[[Tensor, Sequence[int]], bool],
) -> str | None:
    """What is wrong where ``generate``, made to go on with the text after beginnings of these lengths, has not the
    logits that the text has, in its first step and in one from its cache; None where it has."""
    probe = _Probe([text[n] for n in lengths])
    try:
        generate(lm, [text[:n] for n in lengths], 2, (), pad_id, probe)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    first, second = probe.logits
    if near(first, [n - 1 for n in lengths]) and near(second, list(lengths)):
        return None
    return "its logits there are not those of its forward pass"


class _Probe(LogitsProcessor):
    """Keeps each step's logits, and has given ids written."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.logits = ids, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float().clone())
        chosen = torch.tensor(self.ids, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _is_near(whole: Tensor, share: float, logits: Tensor, places: Sequence[int]) -> bool:
    """Whether logits are, up to rounding, those at these places of the whole text."""
    apart = (torch.log_softmax(logits, -1) - torch.log_softmax(whole[list(places)], -1)).abs().max()
    return bool(apart <= share * (1.0 + whole.abs().max()))
