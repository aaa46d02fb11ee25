"""The probability of every next byte along a text, summed over the text's own tokens and over branches.

A branch is a state that has read a beginning of the text by other tokens than the text's own. A byte table
(`gold.kernels.tables`) leaves the mass of such tokens unresolved, because it has no states behind them; here the states
are computed, as far as they have some share of the probability of the text so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gold.bytes.events import EVENTS, UNRESOLVED_EVENT
from gold.bytes.plan import BytePlan, TextTokens
from gold.bytes.trie import VocabularyBytes
from gold.kernels import reference
from gold.kernels.backends import kernel_for
from gold.kernels.layout import ByteLayout, KernelTrie
from gold.kernels.logits import LazyLogits, spans
from gold.kernels.reference import row_logsumexp, widened

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OUTSIDE_EVENT = UNRESOLVED_EVENT
"""The last column of ``Marginals.named``: special tokens and padding rows, which end the text; nothing is unknown about
them."""
CHAIN = 8
"""Tokens of the text that are computed at once behind a branch that has come back to a boundary of the text's own
tokens, and goes on like these."""
MOST_STATES = 16
"""Branches per state of the text beyond which no more are computed: a model that spreads its mass over that many has
no tokenizer's habits."""


class States(Protocol):
    """A model's states along one text, and behind other tokens; ``room``: the most tokens of a text that it can read
    behind the prompt."""

    room: int

    def path(self) -> LazyLogits:
        """The rows along the text's own tokens: one per token, and one more for the stop event if it stopped."""
        ...

    def behind(self, parents: Ints, tokens: Ints) -> LazyLogits:
        """The rows behind one more token each. ``parents``: the state before it, −1 − k for the text's own state k,
        else the number of a branch, counted from 0 over all calls; a parent may be in the same call, before its
        child."""
        ...


@dataclass(frozen=True)
class Marginals:
    """A model's probabilities along a text of L bytes, natural logarithms, relative to nothing.

    ``named[e, y]``: that a text begins with the first e bytes and byte y, by states that were computed, [L + 1, 258];
    column 256 is the stop event, 257 outcomes that are no text. ``open[e]``: tokens that end at e, off every state that
    was computed. ``unknown[e]``: of partial rows, the unknown tokens of states that have read e bytes; ``veiled[e]``
    those of the last of the text's own states, which may reach beyond e. ``known``: positions whose next event is
    predicted. ``rows``: the number of the text's own states; ``branches``: that of the others, and ``passes`` how often
    the model was asked for some.
    """

    named: Floats
    open: Floats
    unknown: Floats
    veiled: Floats
    known: NDArray[np.bool_]
    rows: int
    branches: int
    passes: int

    @property
    def local_rest(self) -> Floats:
        """The unresolved mass at each byte: of tokens that end exactly there, and unknown tokens of the state before
        it."""
        rest: Floats = np.logaddexp(self.open, self.veiled)
        return rest

    @property
    def strict_rest(self) -> Floats:
        """All mass that may be at each byte: what is unresolved there or at any byte before it."""
        rest: Floats = np.logaddexp.accumulate(np.logaddexp(self.open, self.unknown))
        return rest


def marginals(
    vocabulary: VocabularyBytes,
    trie: KernelTrie,
    text: TextTokens,
    stopped: bool,
    states: States,
    least: float | None,
    most_states: int = MOST_STATES,
) -> Marginals:
    """The marginals of a text given in the model's own tokens, as it sampled them or as its tokenizer would.

    ``least``: a token off the text's own states is followed if its probability is at least that share of the text's up
    to its end, as far as the text's own states give it; a lower one follows the same tokens and more. None: no
    branches. ``most_states``: at most so many branches per state of the text.

    Source: sums over all token sequences that cover a byte string, Phan et al. 2410.09303, Hayase et al. 2506.14123.
    """
    tree = _Tree(vocabulary, trie, text, stopped, states.room)
    with torch.no_grad():
        tree.add_path(states.path())
        passes = 0
        while least is not None:
            parents, tokens, begins = tree.chosen(least, most_states)
            if not parents.size:
                break
            tree.add_branches(parents, tokens, begins, states.behind(parents, tokens))
            passes += 1
    return Marginals(
        tree.named, tree.open, tree.unknown, tree.veiled, tree.known, tree.rows, tree.branches, passes
    )


class _Tree:
    """The states of a text that have been computed, and the tokens behind them that end on the text."""

    def __init__(
        self, vocabulary: VocabularyBytes, trie: KernelTrie, text: TextTokens, stopped: bool, room: int
    ) -> None:
        self.vocabulary, self.trie, self.text, self.stopped = vocabulary, trie, text, stopped
        self.room = room
        self.length = len(text.data)
        self.named = np.full((self.length + 1, EVENTS), -np.inf)
        self.unknown, self.veiled = np.full((2, self.length + 1), -np.inf)
        self.known = np.zeros(self.length + 1, np.bool_)
        self.rows = self.branches = 0
        self.weights = np.empty(0)  # of the branches
        self.begins = np.empty(0, np.int64)
        self.depths = np.empty(0, np.int64)  # the number of tokens that each has read
        # Tokens off the path that end on the text, not followed: state, id, end, log-probability.
        self.state, self.token, self.end = (np.empty(0, np.int64) for _ in range(3))
        self.mass = np.empty(0)

    @property
    def open(self) -> Floats:
        """See ``Marginals.open``."""
        return _logsumexp_at(self.mass, self.end, self.length + 1)

    def add_path(self, rows: LazyLogits) -> None:
        """The text's own states."""
        plan = BytePlan.of(self.vocabulary, self.trie.trie, [self.text], [self.stopped])
        found = _Found.of(rows, ByteLayout.of(self.trie, plan, rows.device))
        step = np.maximum(found.target, -1e4)  # finite, as in kernels.tables
        weights = np.cumsum(step) - step
        visits = plan.visits
        begins = np.full(plan.rows, self.length + 1)
        begins[visits.row[visits.starts]] = visits.position[visits.starts]
        self.rows = plan.rows
        self._path_row = np.full(self.length + 2, -1)
        at_root = visits.starts & (visits.node == 0)
        self._path_row[visits.position[at_root]] = visits.row[at_root]
        self.known |= plan.supervised
        self._add(plan, found, weights, -1 - np.arange(plan.rows))
        self._own_total = np.logaddexp(np.logaddexp.reduce(self.named, axis=1), self.open)
        if found.tail is not None and plan.rows:
            row, tail = plan.position_row.astype(np.int64), found.tail + weights
            self.veiled = np.where(np.arange(self.length + 1) >= begins[row], tail[row], -np.inf)
            np.logaddexp.at(self.unknown, begins[begins <= self.length], tail[begins <= self.length])

    def chosen(self, least: float, most_states: int) -> tuple[Ints, Ints, Ints]:
        """The tokens to follow next: parent, id, and the byte at which each ends. They are no longer unfollowed."""
        total = self._own_total
        follow = (self.mass >= np.log(least) + total[self.end]) & (self._depth(self.state) < self.room)
        room = most_states * (self.rows + 1) - self.branches
        if follow.sum() > room:
            # The likeliest first.
            order = np.argsort(-(self.mass - total[self.end])[follow], kind="stable")
            follow[np.flatnonzero(follow)[order[max(0, room) :]]] = False
        picked = self.state[follow], self.token[follow], self.end[follow]
        self._followed_mass = self.mass[follow]
        kept = ~follow
        self.state, self.token, self.end = self.state[kept], self.token[kept], self.end[kept]
        self.mass = self.mass[kept]
        return self._with_chains(*picked)

    def _depth(self, states: Ints) -> Ints:
        """The number of tokens that states have read, given as in ``States.behind``."""
        depths = np.append(self.depths, 0)
        return np.where(states < 0, -1 - states, depths[np.maximum(states, -1)])

    def _with_chains(self, state: Ints, token: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
        """The given tokens, and behind each that is the text's own, after a branch that begins where a token of the
        text does, the next tokens of the text."""
        parents, tokens, ends = state.tolist(), token.tolist(), end.tolist()
        ids, own_ends = self.text.ids, self.text.ends
        exact = self.text.exact
        for n in range(len(parents)):
            branch = parents[n]
            row = int(self._path_row[self.begins[branch]]) if branch >= 0 else -1
            if row < 0 or row >= ids.size or ids[row] != tokens[n] or own_ends[row] != ends[n]:
                continue
            last, room = self.branches + n, self.room - int(self.depths[branch]) - 1
            for k in range(row + 1, min(row + 1 + CHAIN, ids.size, row + 1 + room)):
                if not exact[k] or own_ends[k] <= own_ends[k - 1] or own_ends[k] > self._last_visited:
                    break
                parents.append(last)
                tokens.append(int(ids[k]))
                ends.append(int(own_ends[k]))
                last = self.branches + len(parents) - 1
        return tuple(np.array(x, np.int64) for x in (parents, tokens, ends))  # type: ignore[return-value]

    @property
    def _last_visited(self) -> int:
        return self.length if self.stopped else self.length - 1

    def add_branches(self, parents: Ints, tokens: Ints, begins: Ints, rows: LazyLogits) -> None:
        """The states behind the tokens that were chosen."""
        of = self.vocabulary, self.trie.trie, [self.text], [self.stopped]
        plan = BytePlan.off_path(*of, np.zeros(begins.size, np.int64), begins)
        found = _Found.of(rows, ByteLayout.of(self.trie, plan, rows.device))
        first, weights = self.branches, np.full(begins.size, -np.inf)
        given = self._followed_mass.size
        weights[:given] = self._followed_mass
        taken = np.zeros(found.token.size, np.bool_)
        if begins.size > given:
            within = set((parents[given:] - first).tolist())
            where = {
                (r, i): n
                for n, (r, i) in enumerate(zip(found.row.tolist(), found.token.tolist(), strict=True))
                if r in within
            }
            for n in range(given, begins.size):  # each behind one before it
                parent = int(parents[n]) - first
                at = where.get((parent, int(tokens[n])))
                if at is not None:
                    weights[n] = weights[parent] + found.logp[at]
                    taken[at] = True
        self.branches += begins.size
        self.weights = np.append(self.weights, weights)
        self.begins = np.append(self.begins, begins)
        for parent in parents.tolist():  # which may be among these
            self.depths = np.append(self.depths, self._depth(np.array([parent])) + 1)
        if found.tail is not None:
            np.logaddexp.at(self.unknown, begins, found.tail + weights)
        self._add(plan, found, weights, first + np.arange(begins.size), taken)

    def _add(
        self,
        plan: BytePlan,
        found: _Found,
        weights: Floats,
        states: Ints,
        taken: NDArray[np.bool_] | None = None,
    ) -> None:
        """The named masses of new states, and the tokens behind them that end on the text."""
        cell = plan.mass_position * EVENTS + plan.mass_event
        value = found.mass + weights[plan.mass_row]
        more = _logsumexp_at(value, cell, self.named.size).reshape(self.named.shape)
        self.named = np.logaddexp(self.named, more)
        open_ = np.ones(found.row.size, np.bool_) if taken is None else ~taken
        self.state = np.append(self.state, states[found.row[open_]])
        self.token = np.append(self.token, found.token[open_])
        self.end = np.append(self.end, found.end[open_])
        self.mass = np.append(self.mass, found.logp[open_] + weights[found.row[open_]])


@dataclass(frozen=True)
class _Found:
    """Of some rows: the log-masses of their plan, those of outcomes that are no text under ``OUTSIDE_EVENT``; the
    log-probability of each row's target; of partial rows that of their unknown tokens; and every other token that ends
    on the text, with its ``row``, ``token``, the position of its ``end``, and its ``logp``."""

    mass: Floats
    target: Floats
    tail: Floats | None
    row: Ints
    token: Ints
    end: Ints
    logp: Floats

    @classmethod
    def of(cls, rows: LazyLogits, layout: ByteLayout) -> _Found:
        visits = layout.visits
        visit, token = ending_tokens(layout)
        row = visits.row[visit]
        mass, of_target, logp, tail = _measured(rows, layout, row, token)
        # The first mass of a visit holds the tokens that end there, and where a row begins what is no text too.
        first = visits.mass_ptr[:-1]
        listed = _logsumexp_at(logp, visit, first.size)
        none = layout.trie.trie.own[visits.node] == 0
        outside = np.where(none, mass[first], _without(mass[first], listed))
        mass[first] = np.where(visits.starts, outside, -np.inf)
        return cls(mass, of_target, tail, row, token, visits.position[visit], logp)


def ending_tokens(layout: ByteLayout) -> tuple[Ints, Ints]:
    """All tokens that end on the texts of a layout, off the rows' own: the visit at which each ends, and its id."""
    visits, trie = layout.visits, layout.trie.trie
    own = trie.own[visits.node].astype(np.int64)
    visit = np.repeat(np.arange(own.size), own)
    nth = np.arange(visit.size) - np.repeat(np.cumsum(own) - own, own)
    token = trie.order[trie.low[visits.node[visit]] + nth].astype(np.int64)
    target = layout.target.cpu().numpy()
    other = ~(visits.skips_target[visit] & (token == target[visits.row[visit]]))
    return visit[other], token[other]


def _measured(
    rows: LazyLogits, layout: ByteLayout, row: Ints, token: Ints
) -> tuple[Floats, Floats, Floats, Floats | None]:
    """Log-masses of the layout, log-probability of each row's target, those of the given tokens, and of partial rows
    that of all unknown tokens; blocks of rows at a time."""
    byte_masses = kernel_for(rows.device, reference.byte_masses)
    order = np.argsort(row, kind="stable")
    bounds = np.searchsorted(row[order], np.arange(len(rows) + 1))
    logp = np.empty(row.size)
    parts: list[tuple[Floats, ...]] = []
    rows = rows.in_turn()
    for span in spans(len(rows), rows.block_rows):
        block = rows.select(span)
        logits = block.logits()
        chosen = order[bounds[span.start] : bounds[min(span.stop, len(rows))]]
        at = torch.from_numpy(row[chosen] - span.start).to(rows.device)
        wide = widened(logits[at, torch.from_numpy(token[chosen]).to(rows.device)])
        norm = row_logsumexp(widened(logits))
        logp[chosen] = (wide - norm[at]).double().cpu().numpy()
        tail = torch.zeros(0)
        if block.partial:
            tail = logits[:, -1] - norm
            logits = torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), dim=-1)
        mass, target, _ = byte_masses(
            logits, layout, span.start, overwrite=not block.partial and block.may_overwrite(logits)
        )
        if block.partial:
            known = torch.log1p(-tail.exp())
            low, high = layout.mass_range(span.start, logits.shape[0])
            mass = mass + known[layout.mass_row[low:high] - span.start].to(mass)
            target = target + torch.where(layout.target[span] >= 0, known, 0.0).to(target)
        parts.append(tuple(x.double().cpu().numpy() for x in (mass, target, tail)))
    masses, targets, tails = (np.concatenate(x) for x in zip(*parts, strict=True))
    return masses, targets, logp, tails if rows.partial else None


def _logsumexp_at(value: Floats, where: Ints, size: int) -> Floats:
    """``out[i] = log Σ_{where = i} exp(value)``; −inf where there is none."""
    out = np.full(size, -np.inf)
    np.maximum.at(out, where, value)
    top = np.where(np.isfinite(out), out, 0.0)
    total = np.bincount(where, np.exp(value - top[where]), minlength=size)
    with np.errstate(divide="ignore"):
        summed: Floats = np.log(total) + top
    return summed


def _without(log_all: Floats, log_part: Floats) -> Floats:
    """``log(exp(log_all) − exp(log_part))``, −inf where rounding leaves nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.log1p(-np.exp(np.minimum(log_part - log_all, 0.0))) + log_all
    found: Floats = np.where(np.isfinite(left), left, -np.inf)
    return found
