"""The training state: weights, optimizer, averaged teachers. The only module that gathers, saves and loads weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from gold.activity import Stopped, stop_asked, stoppable
from gold.errors import CheckpointError, ConfigError, EngineError, GoldError, TeacherError
from gold.files import read_json
from gold.kernels.logits import LazyLogits
from gold.models.adapters import (
    MergedWeights,
    adapter_config,
    adapter_state,
    check_trained,
    copy_of,
    is_adapted,
    load_adapter_weights,
    save_adapters,
)
from gold.models.hidden_states import StatesModule, lazy_logits, recompute_activations
from gold.models.language_model import LanguageModel
from gold.models.load import load_weights, save_model
from gold.models.padding import PaddedStates
from gold.models.quantization import quantization_of
from gold.rollout.ahead import Place, RolloutsAhead, load_generations, save_generations
from gold.rollout.engine import Generation
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.train import shards
from gold.train.checkpoint_folder import Checkpoint
from gold.train.optimizer import optimizer_of
from gold.train.recipe import Recipe
from gold.train.sharding import Sharding, shard_like
from gold.train.shards import Snapshot

Answer = TypeVar("Answer")
_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # of weights' shape, in torch and in bitsandbytes
_SHARED = (EngineError, TeacherError, Stopped)
"""What is raised in all processes if one of them raises it."""
AHEAD = "rollouts.npz"
"""The file of a checkpoint with the completions of the next step, if they were under way."""


class TrainState:
    """The student, its optimizer with float32 master weights, the teachers that average it, and the steps so far.

    ``module`` is the student wrapped by accelerate: forward and backward passes of a step go through it. ``reference``
    is the student before training, if an objective needs it (``keep_reference``). Random draws and the position in the
    data follow from ``step``; everything else that a next step depends on is in ``save``.
    """

    def __init__(
        self,
        student: LanguageModel,
        teachers: Teachers | None,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        keep_reference: bool = False,
    ) -> None:
        self.student, self.accelerator = student, accelerator
        self.teachers = teachers.members if teachers else {}
        self.step = self.bad_steps = 0
        self.ahead = RolloutsAhead()
        self.push_s = 0.0
        """Seconds of this step that its pushes of weights to the engine took."""
        check_trained(student.lm, student.name)
        several = accelerator.num_processes > 1
        self.sharding = _sharding(recipe, accelerator) if several and recipe.sharding == "fsdp" else None
        if several and not self.sharding:
            student.lm.to(accelerator.device)
        self.reference: Any = None
        if keep_reference:
            # A teacher that equals the current student need not be stored twice.
            held = teachers.frozen_copy(student.lm) if teachers else None
            self.reference = held or copy_of(student.lm).eval().requires_grad_(False)
        if recipe.gradient_checkpointing is True:
            recompute_activations(student.lm)
        # Policy and gradient must use the same distribution: no dropout or other randomness of train mode.
        student.lm.eval()
        module = StatesModule(student.lm)
        if self.sharding:
            self._shard(self.sharding, module)
        trained = [p for p in student.lm.parameters() if p.requires_grad]
        optimizer = optimizer_of(
            recipe.optimizer, trained, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.masters = optimizer.masters
        if self.sharding:
            self.module, self.optimizer = module, optimizer
            return
        # The model is not moved: a single-process run keeps the requested device.
        self.module, self.optimizer = accelerator.prepare(module, optimizer, device_placement=[False, False])

    def _shard(self, sharding: Sharding, module: StatesModule) -> None:
        """Shards the student, the reference and all teachers in this process."""
        if quantization_of(module.lm) is not None:
            raise ConfigError(
                "train.sharding: quantized weights are not sharded: set it to none, or take a student without them"
            )
        frozen = [t.model for t in self.teachers.values() if t.model is not None]
        if self.reference is not None:
            frozen.append(replace(self.student, lm=self.reference))
        for model in frozen:
            sharding.shard_frozen(model)
        sharding.shard_student(module, arrives=self.student.shards_on is not None)

    # one step

    def whole_student(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the student's model can be used alone, by any number of passes; all processes enter it."""
        return self.sharding.whole() if self.sharding else contextlib.nullcontext()

    def weights_at_hand(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the contents of ``gather`` can be read; all processes enter it. Adapters are merged into
        whole weights, so that those of a student with both are gathered for the time."""
        return self.whole_student() if is_adapted(self.student.lm) else contextlib.nullcontext()

    def passes(self, own: int) -> int:
        """How many forward and backward passes a step has in every process, given the number of this process's
        microbatches."""
        if not self.sharding:
            return max(1, own)
        return max(1, *map(int, gather_object([own])))

    def loss(self, states: PaddedStates, then: Callable[[LazyLogits], Answer]) -> Answer:
        """``then`` of the student's logits, computed within the forward pass of the student."""
        if not self.sharding:
            return cast(Answer, self.module(states, then))
        with self.accelerator.autocast():
            return cast(Answer, self.module(states, then))

    def reference_logits(self, states: PaddedStates) -> LazyLogits | None:
        """The reference model's logits for the same states; None without one."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.accelerator.autocast():
            return lazy_logits(self.reference, states)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a microbatch's forward and backward pass: processes exchange gradients only at the ``last``, or as
        ``Sharding`` says."""
        if self.sharding:
            self.sharding.before_pass(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.module)

    def no_loss(self) -> Tensor:
        """A loss whose gradient is zero: other processes wait for this one's passes."""
        pad, none = self.student.pad_id, np.empty(0, np.int32)
        states = PaddedStates.of([[pad]], [none], [1], pad, self.student.device)
        if self.sharding:
            self.reference_logits(states)  # the others wait for its passes too
        return self.loss(states, lambda logits: 0.0 * logits.logits().sum())

    def clip_gradient(self, max_norm: float) -> float:
        """The norm of the gradient, which is scaled down to ``max_norm`` if it is larger."""
        if self.sharding:
            return self.sharding.clip_gradient(self.module.parameters(), max_norm)
        return float(self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm))

    def update(self, lr: float) -> None:
        """One optimizer step, and one EMA update of every teacher that averages the student."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for teacher in self.teachers.values():
            teacher.ema_update(self.student.lm, self.masters)

    def zero_grad(self) -> None:
        """Clears the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    # weights

    def gather(self) -> Mapping[str, Tensor]:
        """The student's full weights by name, tied ones under each of their names; without copying. Adapters are merged
        into a weight when it is read (``MergedWeights``), within ``weights_at_hand``, and sharded weights gathered
        (``WholeWeights``)."""
        lm = self.student.lm
        if is_adapted(lm):
            return MergedWeights(lm)
        return self.sharding.weights if self.sharding else dict(lm.state_dict())

    def gather_adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The adapter's weights by peft's names, without copying, and the contents of its adapter_config.json; None if
        the student has no adapter."""
        lm = self.student.lm
        return (adapter_state(lm), adapter_config(lm)) if is_adapted(lm) else None

    def save(self, folder: Path, ahead: Mapping[Place, Generation] | None = None) -> None:
        """Writes everything that the next step depends on; of an adapted student only the adapter. ``ahead``: the
        completions of ``completions_ahead``."""
        if is_adapted(self.student.lm):
            save_adapters(self.student.lm, folder / "adapter")
        else:
            save_model(self.student, folder / "student")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        for name, teacher in self.teachers.items():
            if (state := teacher.state()) is not None:
                torch.save(state, folder / average_file(name))
        write_steps(folder, self.step, self.bad_steps, ahead)

    def completions_ahead(self) -> dict[Place, Generation]:
        """The completions of the next step that are under way in all processes, once they are complete."""
        own = self.ahead.contents(self.step)
        if self.accelerator.num_processes == 1:
            return own
        return {place: drawn for each in gather_object([own]) for place, drawn in each.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores the state written by ``save``, bit for bit.

        Raises:
            CheckpointError: it is broken, or of another run.
        """
        folder = checkpoint.path
        self.step, self.bad_steps = read_steps(checkpoint)
        if (file := folder / AHEAD).exists():
            processes, own = self.accelerator.num_processes, self.accelerator.process_index
            ahead = load_generations(file)
            self.ahead.restore(self.step, {p: ahead[p] for p in ahead if p[0] % processes == own})
        if (folder / shards.FOLDER).exists():
            self._load_shards(folder)
            return
        if is_adapted(self.student.lm):
            load_adapter_weights(self.student.lm, folder / "adapter")
        else:
            load_weights(self.student, folder / "student", shard_like)
        with _errors_of(folder / "optimizer.pt"):
            device = torch.device("cpu") if self.sharding else self.student.device
            load_optimizer(self.optimizer, folder / "optimizer.pt", device)
        for name, teacher in self.teachers.items():
            if teacher.state() is not None:
                load_average(teacher, folder, name)

    def whole_on_main(self) -> dict[str, Tensor] | None:
        """The whole weights of a sharded student in main memory, gathered one by one, for the main process; for the
        others an empty dictionary. None if they are not sharded, or are merged with adapters (``weights_at_hand``)."""
        if not self.sharding or is_adapted(self.student.lm):
            return None
        found: dict[Tensor, Tensor] = {}
        own = self.student.lm.state_dict(keep_vars=True)
        for weight in dict.fromkeys(own.values()):
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if self.accelerator.is_main_process:
                found[weight] = whole.detach().to("cpu")
        return {name: found[weight] for name, weight in own.items() if weight in found}

    def snapshot(self) -> Snapshot:
        """A copy of this process's shards of everything that the next step depends on, but for ``write_steps``."""
        assert self.sharding
        return Snapshot(
            shards.tensors_of(self.student.lm, self.optimizer, self.teachers), self.sharding.saving
        )

    def _load_shards(self, folder: Path) -> None:
        """Restores the shards of any number of processes."""
        lm, optimizer = self.student.lm, getattr(self.optimizer, "optimizer", self.optimizer)
        with _errors_of(folder / shards.FOLDER), torch.no_grad():
            shards.prepare_optimizer(lm, optimizer, folder)
            group = self.sharding.saving if self.sharding else None
            shards.read_shards(folder, shards.tensors_of(lm, optimizer, self.teachers), group)

    # processes

    @property
    def index(self) -> int:
        """The number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        """The number of processes."""
        return int(self.accelerator.num_processes)

    def gathered(self, value: Answer) -> list[Answer]:
        """The value of each process."""
        return [value] if self.count == 1 else cast(list[Answer], gather_object([value]))

    def from_main(self, ask: Callable[[], Answer]) -> Answer:
        """The result of ``ask`` in the main process, which alone calls it; its GoldError is raised in all."""
        if self.count == 1:
            return ask()
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [ask()]
            except GoldError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], GoldError):
            raise found[0]
        return cast(Answer, found[0])

    def sum(self, values: Mapping[str, float], *, ragged: bool = False) -> dict[str, float]:
        """Sums over all processes; ``ragged``: some names are missing in some processes."""
        if self.accelerator.num_processes == 1:
            return dict(values)
        names = sorted(set(gather_object(list(values)))) if ragged else sorted(values)
        tensor = torch.tensor(
            [values.get(n, 0.0) for n in names], dtype=torch.float64, device=self.accelerator.device
        )
        return dict(zip(names, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))

    def sum_tensor(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return total.cpu()

    def largest(self, value: float) -> float:
        """The largest value of all processes."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.gather(tensor).max())

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum({"flag": float(flag)})["flag"] > 0

    def together(self, ask: Callable[[], Answer]) -> Answer:
        """The result of ``ask``, which may be left at its reports (``gold.activity``).

        What one process raises is raised in all, since the others would wait: an error of a teacher or of the rollout
        engine, or ``Stopped``.
        """
        answer: Answer | None = None
        failure: Exception | None = None
        try:
            with self.sharding.lockstep() if self.sharding else contextlib.nullcontext(), stoppable():
                answer = ask()
        except _SHARED as error:
            failure = error
        if self.any_process(failure is not None):
            # Each process can report the cause.
            own = next((n for n, kind in enumerate(_SHARED) if isinstance(failure, kind)), len(_SHARED))
            number, reason = min(self.gathered((own, str(failure or ""))), key=lambda found: found[0])
            raise _SHARED[number](reason) from failure
        return cast(Answer, answer)

    def may_stop(self, last: bool) -> None:
        """A point between the forward and the backward pass of a microbatch, at which the step can still be left.

        It is no earlier, since processes exchange buffers in their first forward pass. Where their passes differ in
        number, one that is asked to stop waits here until the others are at their ``last``.

        Raises:
            Stopped: a listener asks for it, in any process: the same in all.
        """
        asked = stop_asked()
        if (self.sharding or last or asked) and self.any_process(asked):
            raise Stopped

    def abandon(self) -> None:
        """Drops what a step that was left has computed: the state is that before the step."""
        self.zero_grad()
        if self.sharding:
            self.sharding.reshard()


def average_file(name: str) -> str:
    """The checkpoint file with the weights of a teacher that averages the student."""
    return f"teacher-{name}.pt"


def load_average(teacher: Teacher, folder: Path, name: str) -> None:
    """Restores a teacher that averages the student, called ``name``, from the folder of a checkpoint.

    Raises:
        CheckpointError: it is broken, or of another teacher.
    """
    own = teacher.state() or {}
    if (folder / shards.FOLDER).exists():
        with _errors_of(folder / shards.FOLDER):
            shards.read_shards(folder, shards.average_of(name, teacher))
        return
    file = folder / average_file(name)
    with _errors_of(file):
        saved = torch.load(file, map_location=teacher.device, weights_only=True)
        teacher.load_state({key: shard_like(value, own.get(key, value)) for key, value in saved.items()})


def _sharding(recipe: Recipe, accelerator: Accelerator) -> Sharding:
    mixed = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    return Sharding(recipe, accelerator.device, mixed)


def load_optimizer(optimizer: Any, file: Path, device: torch.device) -> None:
    """Restores the moments of a checkpoint; learning rate and weight decay stay those of the optimizer.

    Raises:
        ValueError: they are for other weights; any torch error for a file that it cannot read.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(_shards_of(optimizer, torch.load(file, map_location=device, weights_only=True)))
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name in _MOMENTS and value.shape != weight.shape:
                    raise ValueError(f"it has {name} of shape {tuple(value.shape)} for {tuple(weight.shape)}")


def _shards_of(optimizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with this process's shards in place of whole tensors, if its weights are sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(isinstance(weight, DTensor) for weight in weights):
        return dict(saved)
    moments = {
        number: {
            key: shard_like(value, weights[number]) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
        for number, entry in saved["state"].items()
        if number < len(weights)
    }
    masters = saved.get("masters", [])
    own = [*optimizer.masters.values(), *masters][: len(masters)]
    return {
        **saved,
        "state": moments,
        "masters": [shard_like(a, b) for a, b in zip(masters, own, strict=True)],
    }


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Converts any torch error about a file to one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{file} does not belong to this run, or is broken: {reason}") from error


def write_steps(
    folder: Path, step: int, bad_steps: int, ahead: Mapping[Place, Generation] | None = None
) -> None:
    """Writes the number of steps taken, how many of the last were not applied, and the completions of the next."""
    (folder / "state.json").write_text(json.dumps({"step": step, "bad_steps": bad_steps}))
    if ahead:
        save_generations(ahead, folder / AHEAD)


def read_steps(checkpoint: Checkpoint) -> tuple[int, int]:
    """Number of steps taken, and how many of the last were not applied."""
    file = checkpoint.path / "state.json"
    saved = read_json(file, CheckpointError)
    step, bad_steps = (saved.get(name) if isinstance(saved, dict) else None for name in ("step", "bad_steps"))
    if not (
        type(step) is int and type(bad_steps) is int and step == checkpoint.step and 0 <= bad_steps <= step
    ):
        raise CheckpointError(f"{file} is broken: it holds no state of step {checkpoint.step}")
    return step, bad_steps
