"""A teacher in this process: any causal model, frozen, with a dtype and device of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256

import torch

from gold.data import Prompt
from gold.errors import DataError
from gold.kernels.lm_head import LazyLogits
from gold.losses import Need
from gold.models.causal import LanguageModel, PaddedStates, rows_of
from gold.rollout.engine import PromptModel
from gold.tokenize.chat import teacher_prompt_ids
from gold.tokenize.templates import Rendering
from gold.tokenize.vocabulary import TokenizedText, Vocabulary


class LocalTeacher:
    """A language model that grades completions.

    ``batch_tokens`` bounds the padded tokens of one forward pass; texts of like length are scored together.
    """

    gives: Need = "rows"

    def __init__(self, model: LanguageModel, *, batch_tokens: int = 16384) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        model.lm.eval()
        model.lm.requires_grad_(False)

    @property
    def name(self) -> str:
        """Where the model came from."""
        return self.model.name

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's vocabulary."""
        return self.model.vocabulary

    @property
    def rendering(self) -> Rendering:
        """What the model's chat template is given beside messages."""
        return self.model.rendering

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @cached_property
    def revision(self) -> str:
        """The SHA-256 of its weights, which no other state of it has."""
        digest = sha256()
        for name, tensor in sorted(self.model.lm.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See ``chat.teacher_prompt_ids``."""
        return teacher_prompt_ids(self.model.tokenizer, prompt, self.name, self.rendering)

    @property
    def context(self) -> int:
        """Longest sequence in tokens that the model was built for."""
        return self.model.context

    def misfit(self, prompt: Prompt, tokenized: TokenizedText) -> str:
        """See ``Teacher``."""
        return misfit_of(self, prompt, tokenized.ids.size)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``.

        Raises:
            DataError: prompt and completion together do not fit the teacher's context.
        """
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        lengths = [len(p) + s.ids.size for p, s in zip(encoded, tokenized_texts, strict=True)]
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > self.context:
                raise DataError(
                    f"{_too_long(self, prompt, length)}; shorten the prompt or lower rollout.max_new_tokens"
                )
        results: dict[int, LazyLogits] = {}
        for chosen in batches_by_length(lengths, self.batch_tokens):
            rows = [tokenized_texts[i].ids.size + bool(stopped[i]) for i in chosen]
            states = PaddedStates.of(
                [encoded[i] for i in chosen],
                [tokenized_texts[i].ids for i in chosen],
                rows,
                self.model.pad_id,
                self.device,
            )
            whole = rows_of(self.model.lm, states)
            for i, hidden in zip(chosen, whole.hidden_ND.split(rows), strict=True):
                results[i] = replace(whole, hidden_ND=hidden)
        return [results[i] for i in range(len(prompts))]


def misfit_of(teacher: PromptModel, prompt: Prompt, tokens: int) -> str:
    """Why a teacher cannot read so many tokens behind a prompt, "" where it can: they do not fit its context, or it
    cannot read the prompt itself."""
    try:
        length = len(teacher.prompt_ids(prompt)) + tokens
    except DataError as error:
        return str(error)
    if teacher.context is None or length <= teacher.context:
        return ""
    return _too_long(teacher, prompt, length)


def _too_long(teacher: PromptModel, prompt: Prompt, length: int) -> str:
    return (
        f"prompt {prompt.key}: with its completion it takes {length} tokens of teacher {teacher.name}, whose context "
        f"is {teacher.context}"
    )


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that no group, padded to its longest, holds more than ``batch_tokens`` tokens (one always
    fits); longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * max(1, lengths[groups[-1][0]]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
