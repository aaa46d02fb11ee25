"""A teacher in this process: a frozen causal model with its own dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

import torch

from gold.activity import report
from gold.data import Prompt
from gold.errors import DataError
from gold.kernels.logits import LazyLogits
from gold.models.branches import TextStates
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.padding import PaddedStates, batches_by_length, packed_batches, ragged_batches
from gold.teachers.protocol import Teacher
from gold.tokenize.vocabulary import TokenizedText

_TOKENS = 16384


class LocalTeacher(Teacher):
    """A language model that scores completions.

    ``batch_tokens`` bounds the padded tokens of one forward pass, and few of them are padding; without it there are at
    most 16,384, in as few passes as possible. Texts of similar length are scored together; if ``packed`` is set
    (``probe.check_packing``), texts of any lengths without padding.
    """

    model: LanguageModel

    def __init__(self, model: LanguageModel, *, batch_tokens: int | None = None) -> None:
        self.model, self.batch_tokens = model, batch_tokens
        self.name, self.gives, self.vocabulary = model.name, "rows", model.vocabulary
        self.device, self.dtype, self.context = model.device, model.lm.dtype, model.context
        self.tokenizer, self.rendering = model.tokenizer, model.rendering
        model.lm.eval()
        model.lm.requires_grad_(False)

    @cached_property
    def revision(self) -> str:
        """The SHA-256 of its weights."""
        digest = sha256()
        for name, tensor in sorted(self.model.lm.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def cache_revision(self, given: str | None) -> str:
        """See ``Teacher.cache_revision``: by default the digest of the weights."""
        return given or f"weights {self.revision}"

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``.

        Raises:
            DataError: a prompt that it cannot read, or that exceeds its context together with the completion.
        """
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        sizes = [tokenized.ids.size for tokenized in tokenized_texts]
        lengths = [len(ids) + size for ids, size in zip(encoded, sizes, strict=True)]
        for prompt, size, length in zip(prompts, sizes, lengths, strict=True):
            if length > self.model.context:
                raise DataError(
                    f"{self.misfit(prompt, size)}; shorten the prompt or lower rollout.max_new_tokens"
                )
        results: dict[int, LazyLogits] = {}
        batches = self._batches(lengths)
        for chosen in batches:
            if len(batches) > 1:
                report(len(results), len(prompts), "texts")
            rows = [sizes[i] + bool(stopped[i]) for i in chosen]
            texts = [encoded[i] for i in chosen], [tokenized_texts[i].ids for i in chosen]
            states = (
                PaddedStates.packed(*texts, rows, self.device)
                if self.packed
                else PaddedStates.of(*texts, rows, self.model.pad_id, self.device)
            )
            parts = lazy_logits(self.model.lm, states).split(rows)
            results.update(zip(chosen, parts, strict=True))
        return [results[i] for i in range(len(prompts))]

    def states(self, prompt: Prompt, tokenized: TokenizedText, stopped: bool) -> TextStates:
        """See ``Teacher.states``: branches are read behind a cache of the text."""
        return TextStates(self.model, self.prompt_ids(prompt), tokenized.ids, tokenized.ids.size + stopped)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the texts of each forward pass."""
        if self.packed:
            return packed_batches(lengths, self.batch_tokens or _TOKENS)
        if self.batch_tokens:
            return ragged_batches(lengths, self.batch_tokens)
        return batches_by_length(lengths, _TOKENS)
