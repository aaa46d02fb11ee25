"""A model's states along one text and behind other tokens than the text's own: a tree of tokens in one pass each time.

The tokens of a tree stand behind the sequence in the key-value cache; a mask lets each see the prompt and its own
ancestors only, and its position is that of its parent plus one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from gold.kernels.logits import LazyLogits
from gold.models.hidden_states import head_logits, lazy_logits, states_only
from gold.models.language_model import LanguageModel, backbone, without_adapters
from gold.models.padding import PaddedStates, batches_by_length

Ints = NDArray[np.int64]

logger = logging.getLogger(__name__)

_PLAIN_TOKENS = 4096
"""Padded tokens of one forward pass where every branch is read with all that is before it."""


class TextStates:
    """The states of a model along a text behind a prompt, and behind branches of it; without gradient.

    Where the architecture takes a mask of its own (``reads_trees``), branches are tokens behind a cache of the text;
    else each is read again together with all that is before it.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        ids: NDArray[np.int32],
        rows: int,
        *,
        tree: bool | None = None,
    ) -> None:
        """``rows``: how many states of the text are asked for; ``tree``: whether branches are read as a tree; by
        default where that is right."""
        self.model, self.ids, self.rows = model, np.asarray(ids, np.int64), rows
        self.prompt = np.asarray(prompt, np.int64)
        self.room = model.context - self.prompt.size
        # Of each branch: its token, and the state behind which it stands.
        self._tokens, self._parents = list[int](), list[int]()
        if tree is None:
            tree = self.prompt.size + self.ids.size < window_of(model) and reads_trees(model)
        self._tree = _Tree(model) if tree else None

    @torch.no_grad()
    def path(self) -> LazyLogits:
        """The rows along the text's own tokens: state k has read the prompt and k tokens."""
        whole = np.concatenate((self.prompt, self.ids))
        first = self.prompt.size - 1
        if self._tree is None:
            states = PaddedStates.of(
                [self.prompt.tolist()], [self.ids], [self.rows], self.model.pad_id, self.model.device
            )
            return lazy_logits(self.model.lm, states)
        hidden = self._tree.read(whole, np.arange(whole.size))
        return head_logits(self.model.lm, hidden[first : first + self.rows])

    @torch.no_grad()
    def behind(self, parents: Ints, tokens: Ints) -> LazyLogits:
        """The rows behind one more token each; see ``gold.exact.marginals.States``."""
        first = len(self._tokens)
        self._tokens += tokens.tolist()
        self._parents += parents.tolist()
        before = [self._ancestors(n) for n in range(first, len(self._tokens))]
        if self._tree is None:
            return self._plain(before)
        text = self.prompt.size + self.ids.size
        seen = np.zeros((tokens.size, text + len(self._tokens)), np.bool_)
        positions = np.empty(tokens.size, np.int64)
        for n, (own, branches) in enumerate(before):
            read = self.prompt.size + own
            seen[n, :read] = True
            seen[n, text + np.array(branches)] = True
            positions[n] = read + len(branches) - 1
        return head_logits(self.model.lm, self._tree.read(tokens, positions, seen))

    def _ancestors(self, branch: int) -> tuple[int, list[int]]:
        """How many of the text's own tokens a branch has read, and the branches from there on, itself last."""
        path = [branch]
        while (parent := self._parents[path[-1]]) >= 0:
            path.append(parent)
        return -1 - parent, path[::-1]

    def _plain(self, before: Sequence[tuple[int, list[int]]]) -> LazyLogits:
        completions = [
            np.append(self.ids[:own], [self._tokens[b] for b in branches]) for own, branches in before
        ]
        lengths = [self.prompt.size + c.size for c in completions]
        parts: list[Any] = [None] * len(before)
        for chosen in batches_by_length(lengths, _PLAIN_TOKENS):
            states = PaddedStates.of(
                [self.prompt.tolist()] * len(chosen),
                [completions[i] for i in chosen],
                [completions[i].size + 1 for i in chosen],
                self.model.pad_id,
                self.model.device,
            )
            last = np.cumsum([completions[i].size + 1 for i in chosen]) - 1
            rows = lazy_logits(self.model.lm, states).select(torch.from_numpy(last).to(self.model.device))
            for i, row in zip(chosen, rows.split([1] * len(chosen)), strict=True):
                parts[i] = row
        return LazyLogits.joined(parts)


class _Tree:
    """Tokens read one call after another, each of which sees some of those before it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.cache = model, DynamicCache()
        self.positions = np.empty(0, np.int64)

    def read(self, tokens: Ints, positions: Ints, seen: NDArray[np.bool_] | None = None) -> Tensor:
        """The last hidden states of more tokens, [N, D]; ``seen`` [N, tokens so far and these]; None: each sees all
        before it."""
        lm, device = self.model.lm, self.model.device
        self.positions = np.append(self.positions, positions)
        mask: Any = None if seen is None else self._mask(seen)
        if seen is not None and (window := _layered_window(self.model)) is not None:
            near = positions[:, None] - self.positions[None] < window
            mask = {"full_attention": mask, "sliding_attention": self._mask(seen & near)}
        with states_only(lm), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = backbone(lm)(
                input_ids=torch.from_numpy(tokens).to(device)[None],
                attention_mask=mask,
                position_ids=torch.from_numpy(positions).to(device)[None],
                past_key_values=self.cache,
                use_cache=True,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _mask(self, seen: NDArray[np.bool_]) -> Tensor:
        dtype, device = without_adapters(self.model.lm).dtype, self.model.device
        hidden = torch.from_numpy(~seen).to(device)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def _layered_window(model: LanguageModel) -> int | None:
    """The window of those layers that have one, in a model that takes a mask for each kind of layer; else None."""
    config = model.lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return window if "sliding_attention" in kinds <= {"sliding_attention", "full_attention"} else None


def window_of(model: LanguageModel) -> int:
    """The number of tokens that a tree may have with this model: in a model that has one mask for all layers, up to its
    window, within which every token sees all before it."""
    if _layered_window(model) is not None:
        return 2**31
    config = model.lm.config.get_text_config()
    known = [
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")
    ]
    return min([int(w) for w in known if isinstance(w, int) and w > 0], default=2**31)


_READS_TREES: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()
"""The answer for each model that was tested."""


def reads_trees(model: LanguageModel) -> bool:
    """Whether the model's states behind branches are right when they are tokens behind a cache, by a test on a few
    tokens; the answer is kept."""
    lm = without_adapters(model.lm)
    if lm not in _READS_TREES:
        _READS_TREES[lm] = _tested(model)
        if not _READS_TREES[lm]:
            logger.warning(
                "%s: its architecture does not read branches behind a cache; each is read with all before it, which "
                "is slow",
                model.name,
            )
    return _READS_TREES[lm]


@torch.no_grad()
def _tested(model: LanguageModel) -> bool:
    middle = model.vocabulary.size // 2
    ids = np.array([(middle + 3 * k) % model.vocabulary.size for k in range(8)], np.int64)
    other = (ids + 1) % model.vocabulary.size
    text, rest = ids[:2].tolist(), ids[2:6].astype(np.int32)
    parents, tokens = np.array([-1, -3, 1, 0]), np.array([other[2], other[4], ids[6], ids[7]])
    found = []
    for tree in (True, False):
        states = TextStates(model, text, rest, 5, tree=tree)
        try:
            rows = [states.path(), states.behind(parents, tokens)]
            rows.append(states.behind(np.array([2]), other[:1]))
        except Exception:  # whatever an architecture makes of such a mask or cache
            return False
        found.append(torch.log_softmax(LazyLogits.joined(rows).logits().float(), -1))
    behind, plain = found
    coarse = without_adapters(model.lm).dtype.itemsize < 4
    bound = (6e-2 if coarse else 1e-3) * (1.0 + float(plain.abs().max()))
    return bool((behind - plain).abs().max() <= bound)
