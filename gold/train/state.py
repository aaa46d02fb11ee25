"""The training state: weights, optimizer, averaged teachers. The only module that gathers, saves and loads weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gold.errors import CheckpointError, EngineError, TeacherError
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
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.train.checkpoint import Checkpoint
from gold.train.optimizer import MasterAdamW
from gold.train.recipe import Recipe

Answer = TypeVar("Answer")


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
        check_trained(student.lm, student.name)
        if accelerator.num_processes > 1:
            student.lm.to(accelerator.device)
        self.reference: Any = None
        if keep_reference:
            # A teacher that equals the current student need not be stored twice.
            held = teachers.frozen_copy(student.lm) if teachers else None
            self.reference = held or copy_of(student.lm).eval().requires_grad_(False)
        if recipe.gradient_checkpointing:
            recompute_activations(student.lm)
        # Policy and gradient must use the same distribution: no dropout or other randomness of train mode.
        student.lm.eval()
        trained = [p for p in student.lm.parameters() if p.requires_grad]
        optimizer = MasterAdamW(
            trained, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.masters = optimizer.masters
        # The model is not moved: a single-process run keeps the requested device.
        self.module, self.optimizer = accelerator.prepare(
            StatesModule(student.lm), optimizer, device_placement=[False, False]
        )

    # one step

    def reference_logits(self, states: PaddedStates) -> LazyLogits | None:
        """The reference model's logits for the same states; None without one."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.accelerator.autocast():
            return lazy_logits(self.reference, states)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a microbatch's forward and backward pass: processes exchange gradients only at the ``last``."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.module)

    def backward_nothing(self) -> None:
        """A backward pass with gradient zero: other processes wait for this one's share."""
        pad, none = self.student.pad_id, np.empty(0, np.int32)
        states = PaddedStates.of([[pad]], [none], [1], pad, self.student.device)
        self.accelerator.backward(self.module(states, lambda logits: 0.0 * logits.logits().sum()))

    def clip_gradient(self, max_norm: float) -> float:
        """The norm of the gradient, which is scaled down to ``max_norm`` if it is larger."""
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
        into a weight when it is read (``MergedWeights``)."""
        lm = self.student.lm
        return MergedWeights(lm) if is_adapted(lm) else dict(lm.state_dict())

    def gather_adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The adapter's weights by peft's names, without copying, and the contents of its adapter_config.json; None if
        the student has no adapter."""
        lm = self.student.lm
        return (adapter_state(lm), adapter_config(lm)) if is_adapted(lm) else None

    def save(self, folder: Path) -> None:
        """Writes everything that the next step depends on; of an adapted student only the adapter."""
        if is_adapted(self.student.lm):
            save_adapters(self.student.lm, folder / "adapter")
        else:
            save_model(self.student, folder / "student")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        for name, teacher in self.teachers.items():
            if (state := teacher.state()) is not None:
                torch.save(state, folder / average_file(name))
        (folder / "state.json").write_text(json.dumps({"step": self.step, "bad_steps": self.bad_steps}))

    def load(self, checkpoint: Checkpoint) -> None:
        """Restores the state written by ``save``, bit for bit.

        Raises:
            CheckpointError: it is broken, or of another run.
        """
        folder = checkpoint.path
        self.step, self.bad_steps = read_steps(checkpoint)
        if is_adapted(self.student.lm):
            load_adapter_weights(self.student.lm, folder / "adapter")
        else:
            load_weights(self.student, folder / "student")
        with _errors_of(folder / "optimizer.pt"):
            load_optimizer(self.optimizer, folder / "optimizer.pt", self.student.device)
        for name, teacher in self.teachers.items():
            if teacher.state() is not None:
                load_average(teacher, folder / average_file(name))

    # processes

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

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum({"flag": float(flag)})["flag"] > 0

    def together(self, ask: Callable[[], Answer]) -> Answer:
        """The result of ``ask``; an error of a teacher or of the rollout engine in one process is raised in all, since
        the others would wait."""
        answer: Answer | None = None
        failure: TeacherError | EngineError | None = None
        try:
            answer = ask()
        except (TeacherError, EngineError) as error:
            failure = error
        if self.any_process(failure is not None):
            # Each process can report the cause.
            found = gather_object([(isinstance(failure, EngineError), str(failure or ""))])
            of_engine, reason = next((kind, reason) for kind, reason in found if reason)
            raise (EngineError if of_engine else TeacherError)(reason) from failure
        return cast(Answer, answer)


def average_file(name: str) -> str:
    """The checkpoint file with the weights of a teacher that averages the student."""
    return f"teacher-{name}.pt"


def load_average(teacher: Teacher, file: Path) -> None:
    """Restores a teacher from its file in a checkpoint.

    Raises:
        CheckpointError: it is broken, or of another teacher.
    """
    with _errors_of(file):
        teacher.load_state(torch.load(file, map_location=teacher.device, weights_only=True))


def load_optimizer(optimizer: Any, file: Path, device: torch.device) -> None:
    """Restores the moments of a checkpoint; learning rate and weight decay stay those of the optimizer.

    Raises:
        ValueError: they are for other weights; any torch error for a file that it cannot read.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.shape != weight.shape:
                    raise ValueError(f"it has {name} of shape {tuple(value.shape)} for {tuple(weight.shape)}")


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Converts any torch error about a file to one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{file} does not belong to this run, or is broken: {reason}") from error


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
