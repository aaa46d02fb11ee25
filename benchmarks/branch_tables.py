"""Byte tables with branches, differentiable and for a batch of texts: what training on exact tables would take.

A table as in `gold.kernels.tables`, to which the states behind tokens off the path are added, as `gold.exact.marginals`
does for evaluations. All texts of a batch grow their branches together; each time these stand behind the texts in one
pass, with a mask that shows each its own ancestors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gold.bytes.events import EVENTS, UNRESOLVED_EVENT
from gold.bytes.plan import BytePlan
from gold.exact.marginals import MOST_STATES, OUTSIDE_EVENT, Marginals, ending_tokens
from gold.kernels.backends import segment_logsumexp
from gold.kernels.layout import ByteLayout
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.kernels.reference import normalised, row_logsumexp
from gold.kernels.tables import row_masses
from gold.models.hidden_states import head_logits, states_only
from gold.models.language_model import LanguageModel, backbone
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

Ints = NDArray[np.int64]
Behind = Callable[[Ints, Sequence[list[int]]], Tensor]
"""For some texts by number, and some tokens of each, the logits of the state behind them, [N, V]."""
SMALLEST = 1e-30


@dataclass(frozen=True)
class SideTexts:
    """The texts of a batch in one side's tokens, which of them stopped, and the layout of their own rows."""

    vocabulary: Vocabulary
    layout: ByteLayout
    texts: Sequence[TokenizedText]
    stopped: Sequence[bool]

    def behind_plan(self, text: Ints, begins: Ints) -> ByteLayout:
        """The layout of branches of the texts with these numbers, which have read so many bytes."""
        trie = self.layout.trie
        plan = BytePlan.off_path(self.vocabulary, trie.trie, self.texts, self.stopped, text, begins)
        return ByteLayout.of(trie, plan, self.layout.device)


@dataclass(frozen=True)
class BranchTable:
    """``logp`` of every byte event at every position, [positions, 258], as in ``gold.kernels.tables.byte_table``; which
    events some state names, ``resolved``; and the number of ``branches``."""

    logp: Tensor
    resolved: Tensor
    branches: int


def branch_table(side: SideTexts, rows: LazyLogits, behind: Behind, least: float | None) -> BranchTable:
    """The table of a batch with every branch that has at least the share ``least`` of the probability of its text up to
    its end, as far as the text's own states give it; None: no branches. It has gradients where ``rows`` and ``behind``
    have them.

    What is not followed is the unresolved event, and so are outcomes that are no text.
    """
    tree = _Tree(side, rows)
    while least is not None and tree.grow(least, behind):
        pass
    return tree.table()


def table_of(texts: Sequence[Marginals]) -> BranchTable:
    """The table of texts whose marginals were computed one by one, without gradient."""
    named = np.concatenate([each.named for each in texts])
    rest = np.concatenate([np.logaddexp(each.local_rest, each.named[:, OUTSIDE_EVENT]) for each in texts])
    table = torch.from_numpy(np.concatenate((named[:, :UNRESOLVED_EVENT], rest[:, None]), axis=1))
    branches = sum(each.branches for each in texts)
    return BranchTable(normalised(table), torch.from_numpy(np.isfinite(named)), branches)


class _Tree:
    """All states of a batch so far: the texts' own, then branches. Each has a log-weight, the number of its text, the
    tokens that it has read and the bytes of these; the last ones, from ``first`` on, have not been followed yet."""

    def __init__(self, side: SideTexts, rows: LazyLogits) -> None:
        self.side, self.own, self.first = side, len(rows), 0
        self.layout, self.logits = side.layout, rows.logits()
        mass, target, _, _ = row_masses(rows, side.layout, keep=True)
        step = target.double().clamp(min=-1e4)
        self.weight = torch.cumsum(step, 0) - step
        # As in ``joint_table``: relative to the last of the text's own states at each position.
        self.scale = torch.cat((self.weight, self.weight.new_zeros(1)))[side.layout.position_row]
        self.text, self.begins, self.ids = _own_states(side)
        self.cells, self.values = [self.layout.mass_cell], [mass + self.weight[self.layout.mass_row]]
        self.resolved = self.layout.resolved.clone()
        self.total = row_logsumexp(self._joint().detach()) + self.scale.detach()
        self.followed_at, self.followed = list[Tensor](), list[Tensor]()

    def grow(self, least: float, behind: Behind) -> bool:
        """Follows the tokens that end on a text behind the last states; whether there were any."""
        visit, token = ending_tokens(self.layout)
        row, end = (torch.from_numpy(x[visit]) for x in (self.layout.visits.row, self.layout.visits.position))
        logp = torch.log_softmax(self.logits.double(), -1)[row, torch.from_numpy(token)]
        weight = logp + self.weight[self.first + row]
        share = (weight.detach() - self.total[end]).cpu().numpy()
        room = MOST_STATES * (self.own + 1) - (len(self.ids) - self.own)
        chosen = np.argsort(-share, kind="stable")[: max(0, min(room, int((share >= np.log(least)).sum())))]
        if not chosen.size:
            return False
        at = torch.from_numpy(np.sort(chosen))
        parents = (self.first + row[at]).tolist()
        self.followed_at.append(end[at])
        self.followed.append(weight[at])
        self.first = len(self.ids)
        text = self.text[parents]
        starts = np.concatenate(([0], np.cumsum([len(t.data) + 1 for t in self.side.texts])))
        begins = end[at].numpy() - starts[text]
        self.weight = torch.cat((self.weight, weight[at]))
        self.text, self.begins = np.append(self.text, text), np.append(self.begins, begins)
        self.ids += [[*self.ids[p], int(v)] for p, v in zip(parents, token[at.numpy()], strict=True)]
        self.logits = behind(text, self.ids[self.first :])
        self.layout = self.side.behind_plan(text, begins)
        mass = row_masses(GivenLogits(self.logits), self.layout, keep=True)[0]
        self.cells.append(self.layout.mass_cell)
        self.values.append(mass + weight[at][self.layout.mass_row])
        self.resolved |= self.layout.resolved
        return True

    def _joint(self) -> Tensor:
        """The log-mass of every event at every position, relative to ``scale``; followed tokens count as unresolved,
        and again behind them."""
        cells = torch.cat(self.cells)
        values = torch.cat(self.values) - self.scale[cells // EVENTS]
        return segment_logsumexp(values, cells, self.side.layout.positions * EVENTS).view(-1, EVENTS)

    def table(self) -> BranchTable:
        """See ``branch_table``."""
        joint = self._joint()
        top = row_logsumexp(joint).detach()
        rest = (joint[:, UNRESOLVED_EVENT] - top).exp()
        if self.followed:
            at = torch.cat(self.followed_at)
            gone = (torch.cat(self.followed) - self.scale[at] - top[at]).exp()
            rest = (rest - torch.zeros_like(rest).index_add(0, at, gone)).clamp(min=0.0)
        named = joint[:, :UNRESOLVED_EVENT] - top[:, None]
        rest = torch.where(rest > SMALLEST, rest.clamp(min=SMALLEST).log(), -torch.inf)
        whole = torch.cat((named, rest[:, None]), dim=1)
        return BranchTable(whole - row_logsumexp(whole)[:, None], self.resolved, len(self.ids) - self.own)


def _own_states(side: SideTexts) -> tuple[Ints, Ints, list[list[int]]]:
    """The text, the bytes read, and the tokens read of each of the texts' own states."""
    text, begins, ids = list[int](), list[int](), list[list[int]]()
    for number, (each, stopped) in enumerate(zip(side.texts, side.stopped, strict=True)):
        own = each.ids.tolist()
        rows = len(own) + bool(stopped)
        text += [number] * rows
        begins += [0, *each.ends.tolist()][:rows]
        ids += [own[:k] for k in range(rows)]
    return np.array(text, np.int64), np.array(begins, np.int64), ids


def reading(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Behind:
    """The states of a model behind the prompts of some texts, with gradient where that is enabled; the model takes
    masks of its own."""

    def behind(text: Ints, ids: Sequence[list[int]]) -> Tensor:
        trees = {t: _Trie(prompts[t]) for t in sorted(set(text.tolist()))}
        nodes = [trees[t].node(own) for t, own in zip(text.tolist(), ids, strict=True)]
        longest = max(len(tree.tokens) for tree in trees.values())
        row = {t: n for n, t in enumerate(trees)}
        tokens = np.full((len(trees), longest), model.pad_id, np.int64)
        positions = np.zeros_like(tokens)
        seen = np.broadcast_to(np.eye(longest, dtype=np.bool_), (len(trees), longest, longest)).copy()
        for t, tree in trees.items():
            size = len(tree.tokens)
            tokens[row[t], :size], positions[row[t], :size] = tree.tokens, tree.depths
            seen[row[t], :size, :size] = tree.ancestors()
        mask = torch.zeros(seen.shape, dtype=model.lm.dtype)
        mask = mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(mask.dtype).min)
        with states_only(model.lm):
            output = backbone(model.lm)(
                input_ids=torch.from_numpy(tokens),
                attention_mask=mask[:, None],
                position_ids=torch.from_numpy(positions),
                use_cache=False,
            )
        hidden = output.last_hidden_state[torch.tensor([row[t] for t in text.tolist()]), torch.tensor(nodes)]
        return head_logits(model.lm, hidden).logits()

    return behind


class _Trie:
    """The tokens of a prompt and of some continuations, each once, behind one another: their ``depths`` and parents."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens, self.depths = list(prompt), list(range(len(prompt)))
        self.parents = [n - 1 for n in range(len(prompt))]
        self._root, self._children = len(prompt) - 1, dict[tuple[int, int], int]()

    def node(self, ids: Sequence[int]) -> int:
        """The last token of the prompt and these ids, which are added where they are missing."""
        at = self._root
        for v in ids:
            if (at, v) not in self._children:
                self._children[at, v] = len(self.tokens)
                self.tokens.append(v)
                self.depths.append(self.depths[at] + 1)
                self.parents.append(at)
            at = self._children[at, v]
        return at

    def ancestors(self) -> NDArray[np.bool_]:
        """Which tokens each of them sees: itself and those before it."""
        seen = np.eye(len(self.tokens), dtype=np.bool_)
        for n, parent in enumerate(self.parents):
            if parent >= 0:
                seen[n] |= seen[parent]
        return seen
