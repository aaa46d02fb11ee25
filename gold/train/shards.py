"""Checkpoints of sharded weights, by ``torch.distributed.checkpoint``: every process writes its part, and any number of
processes reads them.

…/shards/.metadata        names, shapes and parts of all tensors; written last
…/shards/__R_0.distcp     the parts of process R

The names are ``student.NAME`` for a trained weight or a buffer, ``master.NAME`` and ``optimizer.KEY.NAME`` for a
trained weight, ``teacher.TEACHER.NAME`` for a weight of a teacher that averages the student.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gold.teachers.protocol import Teacher

FOLDER = "shards"
"""The folder of the shards in a checkpoint."""


def tensors_of(lm: Any, optimizer: Any, teachers: Mapping[str, Teacher]) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, tied ones once: those of the model, not copies."""
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    kept = lm.state_dict(keep_vars=True)
    buffers = {name: b for name, b in lm.named_buffers() if name in kept}
    found = {f"student.{name}": tensor for name, tensor in (trained | buffers).items()}
    for name, weight in trained.items():
        updated = optimizer.masters.get(weight, weight)
        if updated is not weight:
            found[f"master.{name}"] = updated
        for key, value in optimizer.state.get(updated, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer.{key}.{name}"] = value
    for teacher, member in teachers.items():
        found |= average_of(teacher, member)
    return found


def average_of(name: str, teacher: Teacher) -> dict[str, Tensor]:
    """The tensors of a checkpoint for a teacher; none for a teacher that does not change."""
    return {f"teacher.{name}.{key}": value for key, value in (teacher.state() or {}).items()}


class Snapshot:
    """A copy in main memory of this process's parts of some tensors, to be written while training continues."""

    def __init__(self, tensors: Mapping[str, Tensor], group: Any) -> None:
        mesh = DeviceMesh.from_group(group, "cpu")
        self.group = group
        self.tensors = {name: _copied(tensor, mesh) for name, tensor in tensors.items()}

    def write(self, folder: Path) -> None:
        """Writes the parts of all processes to ``folder/shards``; all of them call it.

        Raises:
            Exception: any process failed, in all of them.
        """
        writer = FileSystemWriter(folder / FOLDER)
        with _first_failure():
            save(dict(self.tensors), storage_writer=writer, process_group=self.group)


def _copied(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    local = tensor.to_local().to("cpu", copy=True)
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def read_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Reads the tensors of a checkpoint in place, each process its own part; with a ``group`` all of its processes call
    it, without one each reads alone.

    Raises:
        Exception: a tensor is missing or has another shape, or the files are broken.
    """
    alone = group is None or not dist.is_initialized()
    reader = _Reader(folder / FOLDER)
    reader.read_metadata()  # raises what torch would hide
    with _first_failure():
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=alone)


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raises what failed in a process in place of torch's exception over all of them, which is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def prepare_optimizer(lm: Any, optimizer: Any, folder: Path) -> None:
    """Creates the state of an optimizer that has not stepped, with the names, shapes and types of a checkpoint."""
    saved = _Reader(folder / FOLDER).read_metadata().state_dict_metadata
    for name, weight in lm.named_parameters():
        if not weight.requires_grad:
            continue
        updated = optimizer.masters.get(weight, weight)
        for path, entry in saved.items():
            if not (path.startswith("optimizer.") and path.endswith(f".{name}")):
                continue
            key = path.removeprefix("optimizer.").removesuffix(f".{name}")
            if "." in key or not isinstance(entry, TensorStorageMetadata):
                continue  # of another weight, whose name ends in this one's
            kind = entry.properties.dtype
            optimizer.state[updated][key] = (
                torch.zeros_like(updated, dtype=kind, memory_format=torch.preserve_format)
                if entry.size == updated.shape
                else torch.zeros(entry.size, dtype=kind, device=updated.device)
            )


class _Reader(FileSystemReader):
    """Reads tensors only: the list of tensors is a pickle, which could run any code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as stream:
            metadata = _Names(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it holds no list of tensors")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor")
        return metadata


class _Names(pickle.Unpickler):
    """Unpickles the records of ``torch.distributed.checkpoint`` and nothing else."""

    _KNOWN = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    )
    _RECORDS = (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    )

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in self._KNOWN or (
            module == "torch.distributed.checkpoint.metadata" and name.split(".")[-1] in self._RECORDS
        )
        if not known and not (
            module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype)
        ):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found if not known else super().find_class(module, name)
