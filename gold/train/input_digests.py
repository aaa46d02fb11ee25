"""Digests of a run's inputs, so that a resumption detects changed contents under the same name.

Files and weights of up to 256 MiB are read completely; of longer ones the length and 256 blocks of 1 MiB, the first and
the last and the others evenly spaced, so that any contiguous change of a hundredth of the bytes is detected, whatever
the size; of a model in memory every tensor has its own blocks. Times and paths are not included. One core reads
1.0 to 1.2 GB/s if the processor has instructions for SHA-256.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gold.data import Prompt, PromptFile, row_of
from gold.errors import ModelError
from gold.files import ADAPTER_CONFIG
from gold.hub_names import split_revision
from gold.models.files import folder_and_file

if TYPE_CHECKING:
    from gold.models.language_model import LanguageModel
    from gold.teachers.several import Teachers

BLOCK_BYTES = 2**20
BLOCKS = 256
# The files that transformers reads from a model's folder, by kind of contents.
_KINDS = {
    "weights": ("*.safetensors", "pytorch_model*.bin"),
    "settings": ("config.json", "generation_config.json", "adapter_config.json"),
    "tokenizer, chat template": ("tokenizer_config.json",),
    "tokenizer": (
        *(
            "tokenizer.json",
            "tokenizer.model",
            "*.tiktoken",
            "tekken.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
        ),
        *("added_tokens.json", "special_tokens_map.json"),
    ),
    "chat template": ("chat_template.*",),
}


def of_prompts(prompts: Sequence[Prompt], where: str) -> dict[str, Any]:
    """The digest of prompts: their order, keys, texts, completions, references, contexts, routes
    and weights; and the revision of a data set, for people: contents are compared."""
    digest = sha256()
    rows = map(prompts.row, range(len(prompts))) if isinstance(prompts, PromptFile) else map(row_of, prompts)
    for row in rows:
        digest.update(row)
    found = {"from": where, "digests": {"content": digest.hexdigest()}, "count": len(prompts)}
    revision = prompts.facts.revision if isinstance(prompts, PromptFile) else None
    return found | ({"revision": revision} if revision else {})


def of_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The digest of the schemas of an environment's tools; empty without any."""
    if not tools:
        return {}
    digest = _digest_of(json.dumps(list(tools), sort_keys=True))
    return {"tools": {"from": "environment", "digests": {"schemas": digest}}}


def _digest_of(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def of_files(
    path: str | Path, gguf_file: str | None = None, *, weights: bool = True
) -> dict[str, Any] | None:
    """The digests of the files of a model, or of its tokenizer only; None if the path is neither a folder nor a file
    nor in the Hub cache.

    Raises:
        ModelError: one of them cannot be read.
    """
    folder, file, commit = _found(path, gguf_file)
    if folder is None:
        return None
    if file:
        files = {folder / file: "weights and tokenizer"}
    else:
        files = {
            found: kind
            for kind, patterns in _KINDS.items()
            for pattern in patterns
            for found in sorted(folder.glob(pattern))
            if weights or kind != "weights"
        }
    files = {found: kind for found, kind in files.items() if found.is_file()}
    try:
        digests = {f"{found.name} ({kind})": _of_file(found) for found, kind in files.items()}
    except OSError as error:
        raise ModelError(
            f"model {path}: cannot be read: {error.strerror or error} ({error.filename})"
        ) from error
    return {"from": str(path), "digests": digests, **({"revision": commit} if commit else {})}


def of_model(model: "LanguageModel") -> dict[str, Any]:
    """The digests of a model in memory: its weights, its tokenizer, its chat template."""
    import torch

    digest = sha256()
    state = sorted(model.lm.state_dict().items())
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in state)
    for name, tensor in state:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.is_meta:
            continue
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        # Every tensor gets a share of the blocks, so that a change of one tensor is detected.
        share = BLOCKS * BLOCK_BYTES // max(1, len(state))
        for first, last in _spread(data.numel(), total <= BLOCKS * BLOCK_BYTES, max(1, share // 4), 4):
            digest.update(data[first:last].cpu().numpy())
    return {
        "from": model.name,
        "digests": {
            "weights": digest.hexdigest(),
            "tokenizer": model.vocabulary.fingerprint,
            "chat template": _of_text(model.tokenizer),
        },
    }


def of_run(
    student: "LanguageModel",
    teachers: "Teachers | None",
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
) -> dict[str, dict[str, Any]]:
    """The digests of all inputs of a run from Python, by name."""
    found = {
        "student": of_model(student),
        "training prompts": of_prompts(prompts, "given in Python"),
        "held-out prompts": of_prompts(heldout, "given in Python"),
    }
    for name, teacher in teachers.members.items() if teachers else ():
        key = f"teacher.{name}" if teachers and teachers.several else "teacher"
        if teacher.model is not None:
            found[key] = of_model(teacher.model)
        else:
            found[key] = {"from": teacher.name, "digests": {"tokenizer": teacher.vocabulary.fingerprint}}
    return found


def _found(path: str | Path, gguf_file: str | None) -> tuple[Path | None, str | None, str | None]:
    """The folder of a model, the single file in it that is used, and the commit of one from the Hub; None where
    there is none."""
    name, file = folder_and_file(path, gguf_file)
    folder = Path(name)
    if folder.is_dir():
        return folder, file, None
    if folder.is_file():
        return folder.parent, folder.name, None
    name, revision = split_revision(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):  # not a name on the Hub
        return None, None, None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        for needed in (file,) if file else ("config.json", ADAPTER_CONFIG):
            kept = try_to_load_from_cache(name, needed, revision=revision)
            if isinstance(kept, str):
                return Path(kept).parent, file, Path(kept).parent.name
    return None, None, None


def _of_file(file: Path) -> str:
    size = file.stat().st_size
    digest = sha256(f"{size}\n".encode())
    with open(file, "rb") as stream:
        for first, last in _spread(size, size <= BLOCKS * BLOCK_BYTES, BLOCK_BYTES, BLOCKS):
            stream.seek(first)
            digest.update(stream.read(last - first))
    return digest.hexdigest()


def _of_text(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return _digest_of(json.dumps(template, sort_keys=True, default=repr))


def _spread(size: int, whole: bool, block: int, count: int) -> Iterator[tuple[int, int]]:
    """The byte ranges read of `size`: all, or `count` blocks including the first and the last."""
    if whole or size <= block * count:
        yield from ((first, min(first + BLOCK_BYTES, size)) for first in range(0, size, BLOCK_BYTES))
        return
    for number in range(count):
        first = (size - block) * number // (count - 1)
        yield first, first + block
