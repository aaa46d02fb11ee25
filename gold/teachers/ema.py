"""The student as its own teacher: its weights as they were, or a moving average of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gold.errors import ConfigError
from gold.models.causal import LanguageModel
from gold.teachers.local import LocalTeacher


class SelfTeacher(LocalTeacher):
    """A copy of the student that grades it; it has something to teach where its prompts say more than the student's.

    The copy is made here and now. With ``decay`` 1 it stays as it is; below, a run makes it follow the student: after
    every optimizer step ``θ_T ← decay · θ_T + (1 − decay) · θ_S`` over the weights that are trained, beginning at the
    student's own. It is as large as the student; weights of 16 bits are averaged, and kept, in float32.

    Raises:
        ConfigError: a decay outside 0 to 1.

    Source: Shenfeld et al. 2601.19897, section 3 (average, demonstrations as context); Zhao et al. 2601.18734 (fixed
    weights, reference solutions as context).
    """

    def __init__(self, student: LanguageModel, decay: float = 1.0, *, batch_tokens: int = 16384) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"decay of a teacher that follows its student: expected 0 to 1, got {decay}")
        lm = copy.deepcopy(student.lm)
        # In 16 bits a hundredth of a small difference is rounded away.
        if decay < 1.0 and next(lm.parameters()).dtype in (torch.bfloat16, torch.float16):
            lm = lm.float()
        what = "frozen" if decay == 1.0 else f"averaged, decay {decay:g}"
        super().__init__(
            replace(student, name=f"{student.name} itself, {what}", lm=lm), batch_tokens=batch_tokens
        )
        self.decay = decay

    @torch.no_grad()
    def follow(self, student: Any, masters: Mapping[Tensor, Tensor] = MappingProxyType({})) -> None:
        """One step of the average towards the student's transformers model, or the float32 copies of its weights."""
        if self.decay == 1.0:
            return
        pairs = zip(self.model.lm.parameters(), student.parameters(), strict=True)
        for mine, theirs in pairs:
            if theirs.requires_grad:
                mine.lerp_(masters.get(theirs, theirs).detach().to(mine), 1.0 - self.decay)

    def load(self, file: Path) -> None:
        """Takes the weights that a checkpoint holds, bit for bit."""
        self.model.lm.load_state_dict(torch.load(file, map_location=self.device, weights_only=True))

    def equals(self, student: Any) -> bool:
        """Whether it has, bit for bit, the weights of the student's transformers model."""
        pairs = zip(self.model.lm.parameters(), student.parameters(), strict=True)
        return all((a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b) for a, b in pairs)
