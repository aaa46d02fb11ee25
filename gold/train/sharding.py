"""Weights sharded over the processes by torch's FSDP2; ``TrainState`` builds and uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gold.models.adapters import adapter_parameters
from gold.models.hidden_states import StatesModule, decoder_layers, lazy_logits
from gold.models.language_model import LanguageModel, backbone
from gold.models.padding import PaddedStates
from gold.train.arriving import arriving
from gold.train.recipe import Recipe


class Sharding:
    """The student and frozen models with their weights sharded over all processes.

    Each layer of the student is gathered for the time it computes; so are, together, its embeddings, last norm and
    output matrix, for the time of a forward and backward pass. Of a frozen model the layers are sharded, and everything
    else stays whole on every process, since its logits are computed later, from its states and its output matrix.

    Adapters are small: every process holds them whole, and their gradients are averaged once a step.

    Every forward pass of a sharded model needs all processes. Passes of the student are made equal in number
    (``TrainState.passes``), or its weights are gathered for the time (``whole``); passes of frozen models are made in
    ``lockstep``.

    With ``gradient_sync`` "step" the gradient is reduced, and the weights are gathered, once a step and not once in
    each of its microbatches; the process then holds them whole meanwhile.
    """

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype | None) -> None:
        self.mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.control = dist.new_group(backend="gloo")
        """Group for messages between the processes, apart from those of the weights."""
        self.saving = dist.new_group(backend="gloo")
        """Group of the thread that writes checkpoints."""
        self.once_a_step = recipe.gradient_sync == "step"
        self.device, self.dtype = device, dtype
        self.module: Any = None
        self.weights = WholeWeights(self, {})
        self.frozen: list[Any] = []
        self._in_lockstep = self._is_whole = False

    def shard_student(self, module: StatesModule, *, arrives: bool = False) -> None:
        """Shards the student inside ``module``, whose forward pass it must be used through from now on.
        ``arrives``: its weights are in the first process alone."""
        narrow = any(p.dtype.itemsize < 4 for p in module.parameters()) or self.dtype is not None
        # Gradients of 16 bits are added up in float32.
        policy = MixedPrecisionPolicy(self.dtype, torch.float32 if narrow else None)
        whole: set[nn.Parameter] = adapter_parameters(module.lm)
        with self._arriving(module, arrives):
            for layer in decoder_layers(module.lm):
                fully_shard(layer, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
            fully_shard(module, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        self.module = module
        # What is gathered ahead in a backward pass is stated here. By default it follows from all passes since the last
        # one, those of ``whole`` included, which are different ones in each process.
        behind: nn.Module = module
        for layer in decoder_layers(module.lm):
            layer.set_modules_to_backward_prefetch([behind])  # type: ignore[operator]
            behind = layer
        self.module.set_modules_to_backward_prefetch([behind])
        self.module.set_reshard_after_forward(not self.once_a_step)
        self.module.set_reshard_after_forward(False, recurse=False)
        with torch.no_grad():  # the root must be the first that runs
            module(self.no_states(0), lambda logits: None)
        self.reshard()
        self.weights = WholeWeights(self, module.lm.state_dict())

    def _arriving(self, module: nn.Module, arrives: bool) -> contextlib.AbstractContextManager[None]:
        group = self.mesh.get_group()
        return arriving(module, self.device, group) if arrives else contextlib.nullcontext()

    def shard_frozen(self, model: LanguageModel) -> None:
        """Shards the layers of a model that is not trained; one that is on another device, has no marked layers, or is
        quantised, stays whole."""
        lm = model.lm
        if lm in self.frozen:
            return
        weights = list(lm.parameters())
        layers = decoder_layers(lm)
        arrives = model.shards_on is not None
        elsewhere = any(p.device != self.device or not p.is_floating_point() for p in weights) and not arrives
        inside = {p for layer in layers for p in layer.parameters()} - adapter_parameters(lm)
        body: nn.Module = backbone(lm)
        with self._arriving(lm, arrives):
            if elsewhere or not layers:
                return
            for layer in layers:
                fully_shard(layer, mesh=self.mesh, ignored_params=set(weights) - inside)
            fully_shard(body, mesh=self.mesh, ignored_params={p for p in weights if p not in inside})
        body.register_forward_pre_hook(partial(self.await_turn, len(self.frozen)), prepend=True)
        self.frozen.append(lm)

    # the student

    def before_pass(self, last: bool) -> None:
        """Called before each forward and backward pass of a step; ``last``: the last one."""
        if self.once_a_step:
            self.module.set_requires_gradient_sync(last)
            self.module.set_is_last_backward(last)
            self.module.set_reshard_after_backward(last)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A context in which every process has all weights of the student and uses the model alone; all processes enter
        it."""
        if self._is_whole:
            yield
            return
        self.module.set_reshard_after_forward(False)
        for each in self._groups():
            each.unshard()
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            self.reshard()
            self.module.set_reshard_after_forward(not self.once_a_step)
            self.module.set_reshard_after_forward(False, recurse=False)

    def clip_gradient(self, weights: Iterable[Tensor], max_norm: float) -> float:
        """The norm of the whole gradient, the same in all processes; it is scaled down to ``max_norm``."""
        weights = list(weights)
        self._average([w for w in weights if w.requires_grad and not isinstance(w, DTensor)])
        weights = [w for w in weights if w.grad is not None]
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return float(norm)

    def _average(self, weights: Sequence[Tensor]) -> None:
        """Averages the gradients of weights that every process holds whole: those of adapters."""
        if not weights:
            return
        for weight in weights:  # an expert that had no token here may have had one elsewhere
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients = [w.grad for w in weights if w.grad is not None]
        flat = torch.cat([g.flatten().float() for g in gradients])
        dist.all_reduce(flat, group=self.mesh.get_group())
        flat /= self.mesh.size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def no_states(self, pad_id: int) -> PaddedStates:
        """The input of a forward pass that other processes wait for."""
        return PaddedStates.of([[pad_id]], [np.empty(0, np.int32)], [1], pad_id, self.device)

    def _groups(self) -> Iterator[FSDPModule]:
        yield from (each for each in self.module.modules() if isinstance(each, FSDPModule))

    def reshard(self) -> None:
        """Frees the whole weights that a pass has gathered."""
        for each in self._groups():
            each.reshard()

    # what only some processes want

    @contextlib.contextmanager
    def lockstep(self) -> Iterator[None]:
        """A context in which processes may make different forward passes of frozen models, and read different whole
        weights, or none: each takes part in those of the others, by a pass of one token, until all have left. An error
        in one process waits for them too. All processes enter it."""
        if self._in_lockstep:
            yield
            return
        self._in_lockstep = True
        try:
            yield
            self._catch_up()
        except Exception:
            self._catch_up()
            raise
        finally:
            self._in_lockstep = False

    def await_turn(self, number: int, *_: Any) -> None:
        """Before the pass of a frozen model, numbered from 0, or the gathering of a weight of the student, numbered
        after them: takes part in those with lower numbers until it is this one's turn."""
        while self._in_lockstep and (turn := self._turn(number)) != number:
            self._take_part(turn)

    def _catch_up(self) -> None:
        while (turn := self._turn(-1)) >= 0:
            self._take_part(turn)

    def _turn(self, number: int) -> int:
        """What comes next, given what this process wants, or −1: the lowest number of all processes; −1 if none wants
        anything."""
        wanted = [torch.zeros((), dtype=torch.int64) for _ in range(self.mesh.size())]
        dist.all_gather(wanted, torch.tensor(number), group=self.control)
        return min((int(each) for each in wanted if each >= 0), default=-1)

    @torch.no_grad()
    def _take_part(self, number: int) -> None:
        self._in_lockstep = False
        try:
            if number < len(self.frozen):
                lazy_logits(self.frozen[number], self.no_states(0))
            else:
                self.weights.gather(number - len(self.frozen))
        finally:
            self._in_lockstep = True


class WholeWeights(Mapping[str, Tensor]):
    """The whole tensors of the sharded student, each gathered when it is read: by any process in ``lockstep``, else by
    all of them in the same order."""

    def __init__(self, sharding: Sharding, shards: Mapping[str, Tensor]) -> None:
        self.sharding, self.shards = sharding, shards
        self.numbers = {name: number for number, name in enumerate(shards)}

    def gather(self, number: int) -> Tensor:
        """The whole tensor of this number; all processes call it."""
        shard = list(self.shards.values())[number]
        return shard.full_tensor() if isinstance(shard, DTensor) else shard

    def __getitem__(self, name: str) -> Tensor:
        number = self.numbers[name]
        self.sharding.await_turn(len(self.sharding.frozen) + number)
        return self.gather(number)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def shard_like(whole: Tensor, shard: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as another of its shape; a whole one for a whole one."""
    if not isinstance(shard, DTensor) or whole.shape != shard.shape:
        return whole
    whole = whole.to(shard.device)
    return distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
