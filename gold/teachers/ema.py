"""The student as its own teacher: its initial weights, or a moving average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gold.errors import ConfigError
from gold.models.adapters import copy_of, is_adapted
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher


class SelfTeacher(LocalTeacher):
    """A copy of the student as its teacher; useful if the teacher's prompts contain more than the student's.

    The copy is made at creation. With ``decay`` 1 it is fixed; below 1, it averages the student: after every optimizer
    step ``θ_T ← decay · θ_T + (1 − decay) · θ_S`` over the trained weights, starting from the student's. It needs as
    much memory as the student; 16-bit weights are averaged, and kept, in float32. With a student that has an adapter
    it shares all weights but the adapter's, which alone are copied and averaged.

    Raises:
        ConfigError: a decay outside 0 to 1.

    Source: Shenfeld et al. 2601.19897, section 3 (average, demonstrations as context); Zhao et al. 2601.18734 (fixed
    weights, reference solutions as context).
    """

    def __init__(
        self, student: LanguageModel, decay: float = 1.0, *, batch_tokens: int | None = None
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay of a self teacher: expected 0 to 1, got {decay}")
        lm = copy_of(student.lm)
        self._own: dict[str, Tensor] = {}
        if is_adapted(lm):
            self._own = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        # In 16 bits, a hundredth of a small difference rounds to zero.
        elif decay < 1.0 and next(lm.parameters()).dtype in (torch.bfloat16, torch.float16):
            lm = lm.float()
        self._wide = {p: p.detach().float() for p in self._own.values() if p.dtype.itemsize < 4}
        what = "frozen" if decay == 1.0 else f"averaged, decay {decay:g}"
        super().__init__(
            replace(student, name=f"{student.name} itself, {what}", lm=lm), batch_tokens=batch_tokens
        )
        self.decay = decay

    @torch.no_grad()
    def ema_update(self, student: Any, masters: Mapping[Tensor, Tensor] = MappingProxyType({})) -> None:
        """Updates the average with the student's weights, or their float32 master copies."""
        if self.decay == 1.0:
            return
        for mine, theirs in zip(self.model.lm.parameters(), student.parameters(), strict=True):
            if theirs.requires_grad:
                average = self._wide.get(mine, mine)
                here, there = _parts(average, masters.get(theirs, theirs).detach())
                here.lerp_(there.to(here), 1.0 - self.decay)
        for mine, average in self._wide.items():
            mine.copy_(average)

    def state(self) -> dict[str, Tensor] | None:
        """The averaged weights, of a student with an adapter those of the adapter; None if they are fixed."""
        if self.decay == 1.0:
            return None
        return {n: self._wide.get(p, p).detach() for n, p in self._own.items()} or self.model.lm.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the weights bit for bit.

        Raises:
            ValueError: they are of another adapter.
        """
        if not self._own:
            self.model.lm.load_state_dict(state)
            return
        if state.keys() != self._own.keys():
            raise ValueError("it holds the average of another adapter")
        with torch.no_grad():
            for name, mine in self._own.items():
                self._wide.get(mine, mine).copy_(state[name])
                mine.copy_(state[name])


def _parts(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors on this process: of two sharded ones this process's parts, of one the whole."""
    if isinstance(mine, DTensor) and isinstance(theirs, DTensor):
        return mine.to_local(), theirs.to_local()
    return mine, theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
