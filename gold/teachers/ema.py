"""The student as its own teacher: its initial weights, or a moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gold.errors import ConfigError
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher


class SelfTeacher(LocalTeacher):
    """A copy of the student as its teacher; useful if the teacher's prompts contain more than the student's.

    The copy is made at creation. With ``decay`` 1 it is fixed; below 1, it averages the student: after every optimizer
    step ``θ_T ← decay · θ_T + (1 − decay) · θ_S`` over the trained weights, starting from the student's. It needs as
    much memory as the student; 16-bit weights are averaged, and kept, in float32.

    Raises:
        ConfigError: a decay outside 0 to 1.

    Source: Shenfeld et al. 2601.19897, section 3 (average, demonstrations as context); Zhao et al. 2601.18734 (fixed
    weights, reference solutions as context).
    """

    def __init__(self, student: LanguageModel, decay: float = 1.0, *, batch_tokens: int = 16384) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay of a self teacher: expected 0 to 1, got {decay}")
        lm = copy.deepcopy(student.lm)
        # In 16 bits, a hundredth of a small difference rounds to zero.
        if decay < 1.0 and next(lm.parameters()).dtype in (torch.bfloat16, torch.float16):
            lm = lm.float()
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
                mine.lerp_(masters.get(theirs, theirs).detach().to(mine), 1.0 - self.decay)

    def state(self) -> dict[str, Tensor] | None:
        """The averaged weights; None if they are fixed."""
        return None if self.decay == 1.0 else self.model.lm.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the weights bit for bit."""
        self.model.lm.load_state_dict(state)
