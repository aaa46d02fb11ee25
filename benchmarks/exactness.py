"""`python -m benchmarks exactness`: byte tables and prefix targets beside sums over all segmentations of the past.

A byte table follows one segmentation of the text that was read; the probability of the next byte is a sum over all.
Toy models are enumerated in full. Of real models every token sequence is summed that leaves the tokenizer's own within
the last bytes and has some probability beside it; what is left out is told.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import divergence
from benchmarks.assets import AssetError, model_path
from benchmarks.record import RESULTS, device_name, write_record
from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.bytes.events import OBSERVED
from gold.bytes.trie import ByteTrie
from gold.data import Prompt
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.kernels.projection import needed_rows, piece_events, piece_target
from gold.kernels.tables import byte_tables
from gold.losses import LossInputs
from gold.losses.prefix import prefix_positions
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.models.padding import PaddedStates
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import ToyModel, toy_vocabulary

Probs = NDArray[np.float64]
NextProb = Callable[[Sequence[tuple[int, ...]]], Probs]
"""Next-token probabilities after each of some contexts: [contexts, width]."""

MODELS = ("smollm2-135m-instruct", "gemma3-270m")
TEXTS = (
    ("The history of the town begins", " in 1742, when a mill was built."),
    ("def mean(values):\n", "    return sum(values) / len(values)\n"),
    ("Der Bahnhof liegt", " gleich hinter der Brücke."),
)
"""Prompt and completion."""
EXACT_TOY, EXACT_REAL = 1e-9, 1e-3
"""What is within that of the exact probabilities, in total variation, counts as exact."""
CPU = torch.device("cpu")


class Past(NamedTuple):
    """A token sequence that spells a beginning of a text: ids, bytes, log-probability, and the byte at which it left
    the text's own tokens (None: it is some of these)."""

    ids: tuple[int, ...]
    begin: int
    logp: float
    left_at: int | None


@dataclass
class Marginals:
    """Sums over token sequences that read a text: all that were followed, and those along the tokenizer's own alone.

    ``next_byte[e]`` are the probabilities of ``text[:e]`` and then each byte, or the stop event (column 256);
    ``last_state`` those from the last of the text's own tokens alone, without the longer ones that begin earlier.
    ``pieces[e]`` are those of ``text[:e]`` and then each piece, with four more columns, where they are asked for.
    ``left_out[e]``: the share of ``text[:e]`` of what was not followed, if it goes on like the rest; ``other_pasts[e]``
    that of what was, and is not along the own tokens. ``sequences``: how many of these were followed. ``along``: see
    ``marginals``.
    """

    next_byte: Probs
    last_state: Probs
    pieces: dict[int, Probs]
    left_out: Probs
    other_pasts: Probs
    sequences: int = 0
    along: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def prefix(self) -> Probs:
        """The probability that a text begins with ``text[:e]``."""
        total: Probs = self.next_byte.sum(-1)
        return total


def marginals(
    next_prob: NextProb,
    vocabulary: Vocabulary,
    trie: ByteTrie,
    ids: Sequence[int],
    text: bytes,
    *,
    pieces_at: NDArray[np.int32] | None = None,
    columns: int = 0,
    positions: Sequence[int] = (),
    spans: Sequence[tuple[int, int]] = (),
    least: float = 0.0,
    window: int = 10**9,
    batch: int = 16,
) -> Marginals:
    """The marginals of a text whose own tokens are ``ids``.

    A sequence is followed no further when its probability is below ``least`` of that of the text so far along the own
    tokens, or when it left these more than ``window`` bytes ago. ``spans``: pairs e, f of which ``along`` is the
    probability of ``text[:f]`` by sequences with a token that begins at e or before and reaches f.
    """
    length, own_count = len(text), len(ids)
    ends = [0]
    for token in ids:
        ends.append(ends[-1] + len(vocabulary.token_bytes(int(token))))
    result = Marginals(
        np.zeros((length + 1, 257)),
        np.zeros((length + 1, 257)),
        {e: np.zeros(columns) for e in positions},
        np.zeros(length + 1),
        np.zeros(length + 1),
        along=dict.fromkeys(spans, 0.0),
    )
    todo: list[Past] = []

    def follow(past: Past, prob: Probs) -> None:
        weight, begin = float(np.exp(past.logp)), past.begin
        below = np.concatenate(([0.0], np.cumsum(prob[trie.order])))
        stop = weight * float(prob[trie.stops].sum())
        # Where the next of the text's own tokens ends, if this is where it begins.
        following = None if past.left_at is not None else len(past.ids)
        own_end = length + 1 if following in (None, own_count) else ends[len(past.ids) + 1]
        node, e = 0, begin
        while True:
            children = slice(int(trie.first_child[node]), int(trie.first_child[node] + trie.children[node]))
            low, own, high = int(trie.low[node]), int(trie.own[node]), int(trie.high[node])
            mass = weight * (below[trie.high[children]] - below[trie.low[children]])
            for table in [
                result.next_byte,
                *([result.last_state] if following is not None and e < own_end else []),
            ]:
                table[e, trie.byte[children]] += mass
                table[e, 256] += stop if e == begin else 0.0
            if e in result.pieces and pieces_at is not None:
                tokens = trie.order[low + own : high]
                piece = pieces_at[vocabulary.offsets[tokens] + e - begin]
                named = np.where(piece >= 0, piece, columns - 2)
                result.pieces[e] += weight * np.bincount(named, prob[tokens], minlength=columns)
                result.pieces[e][columns - 4] += stop if e == begin else 0.0
            for a, b in spans:
                if e == b and begin <= a:
                    result.along[a, b] += weight * float(below[high] - below[low])
            for v in trie.order[low : low + own].tolist() if e > begin else []:
                if prob[v] > 0.0 and not (e == own_end and following is not None and v == ids[following]):
                    left_at = begin if past.left_at is None else past.left_at
                    todo.append(Past((*past.ids, v), e, past.logp + float(np.log(prob[v])), left_at))
            if e == length:
                return
            at = children.start + int(np.searchsorted(trie.byte[children], text[e]))
            if at == children.stop or trie.byte[at] != text[e]:
                return
            node, e = at, e + 1

    logp = 0.0
    contexts = [tuple(int(t) for t in ids[:k]) for k in range(own_count + 1)]
    for first in range(0, len(contexts), batch):
        chosen = contexts[first : first + batch]
        for context, prob in zip(chosen, next_prob(chosen), strict=True):
            follow(Past(context, ends[len(context)], logp, None), prob)
            if len(context) < own_count:
                logp += float(np.log(prob[ids[len(context)]]))
    own_prefix = result.prefix
    while todo:
        todo.sort(key=lambda past: len(past.ids))
        pasts, todo[:] = todo[:batch], todo[batch:]
        kept = []
        for past in pasts:
            share = float(np.exp(past.logp)) / own_prefix[past.begin]
            if share < least or past.begin - (past.left_at or 0) > window:
                result.left_out[past.begin :] += share
            else:
                kept.append(past)
        result.sequences += len(kept)
        for past, prob in zip(kept, next_prob([past.ids for past in kept]) if kept else [], strict=True):
            follow(past, prob)
    result.other_pasts[:] = 1.0 - own_prefix / result.prefix
    return result


class CanonicalModel(ToyModel):
    """A toy model that only writes what its tokenizer would write."""

    def row(self, context: Sequence[int]) -> torch.Tensor:
        """See ``ToyModel.row``; tokens that the tokenizer would not put there have no probability."""
        ids = [int(i) for i in context]
        key = tuple(self.vocabulary.token_bytes(i) for i in ids)
        if key not in self.rows:
            logits = super().row(context).clone()
            for v in range(self.vocabulary.size):
                token = self.vocabulary.token_bytes(v)
                if token and self.vocabulary.encode(b"".join(key) + token).ids.tolist() != [*ids, v]:
                    logits[v] = -torch.inf
            self.rows[key] = logits
        return self.rows[key]


def toy_prob(model: ToyModel) -> NextProb:
    """Its next-token probabilities."""
    return lambda contexts: np.stack([torch.softmax(model.row(c), -1).numpy() for c in contexts])


def model_prob(model: LanguageModel, prompt: Sequence[int]) -> NextProb:
    """The next-token probabilities of a real model behind a prompt."""

    def prob(contexts: Sequence[tuple[int, ...]]) -> Probs:
        completions = [np.array(c, np.int64) for c in contexts]
        prompts, lengths = [prompt] * len(contexts), [len(c) + 1 for c in contexts]
        states = PaddedStates.of(prompts, completions, lengths, model.pad_id, model.device)
        rows = lazy_logits(model.lm, states).select(torch.from_numpy(np.cumsum(lengths) - 1))
        with torch.no_grad():
            return torch.softmax(rows.logits().double(), -1).numpy()

    return prob


def states_along(model: LanguageModel, prompt: Sequence[int], ids: NDArray[np.int32]) -> LazyLogits:
    """A real model's states along a text, from the one behind the prompt to the one behind its last token."""
    with torch.no_grad():
        states = PaddedStates.of([prompt], [ids], [ids.size + 1], model.pad_id, model.device)
        return lazy_logits(model.lm, states)


def byte_errors(table: torch.Tensor, exact: Marginals) -> dict[str, Probs]:
    """By position, how far a byte table is from the exact probabilities of the next byte, and what that comes from.

    ``tv`` and ``kl_nats``: total variation, and KL(table ‖ exact), with the table's rest left out and its other events
    scaled up; ``excess``: by how much its events are together too likely, 0 where all that is missing is in the rest;
    ``tv_last_state``: the total variation of the last state's own probabilities, without cover terms; ``other_pasts``:
    the share of the text so far that other segmentations have.
    """
    prob, rest = table[:, :257].exp().numpy(), table[:, 257].exp().numpy()
    truth = exact.next_byte / exact.prefix[:, None]
    scaled = prob / prob.sum(-1, keepdims=True)
    last = exact.last_state / exact.last_state.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The exact sums are differences of float64 sums of up to 1: below that they are zero.
        kl = np.where(truth > 1e-14, scaled * (np.log(scaled) - np.log(truth)), 0.0)
        kl = np.nan_to_num(kl, nan=0.0).sum(-1)
    return {
        "tv": 0.5 * np.abs(scaled - truth).sum(-1),
        "kl_nats": kl,
        "excess": np.maximum(prob - truth, 0.0).sum(-1),
        "rest": rest,
        "tv_last_state": 0.5 * np.abs(last - truth).sum(-1),
        "other_pasts": exact.other_pasts,
        "left_out": exact.left_out,
    }


def summary(errors: Sequence[dict[str, Probs]], exact_below: float) -> dict[str, Any]:
    """Shares and sizes over all positions."""
    joined = {name: np.concatenate([e[name] for e in errors]) for name in errors[0]}
    found: dict[str, Any] = {"positions": int(joined["tv"].size)}
    found["share_exact"] = float((joined["tv"] < exact_below).mean())
    found["share_exact_up_to_rest"] = float((joined["excess"] < exact_below).mean())
    if "tv_last_state" in joined:
        found["share_exact_last_state"] = float((joined["tv_last_state"] < exact_below).mean())
    for name, values in joined.items():
        found[name] = {
            "mean": float(values.mean()),
            "p90": float(np.quantile(values, 0.9)),
            "max": float(values.max()),
        }
    return found


# Toy models.

TOYS: dict[str, Vocabulary] = {
    "a b _ + ab b_ abb": toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None),
    "a b _ + aa ba baa": toy_vocabulary(["a+a", "b+a", "ba+a"]),
    "a b c + ab bc abc ca": toy_vocabulary(["a+b", "b+c", "ab+c", "c+a"], letters="abc", cut=None),
    "a b c + aa cb bc": toy_vocabulary(["a+a", "c+b", "b+c"], letters="abc", cut=None),
}
TOY_PAIRS = (
    ("a b _ + ab b_ abb", "a b _ + aa ba baa"),
    ("a b _ + aa ba baa", "a b _ + ab b_ abb"),
    ("a b c + ab bc abc ca", "a b c + aa cb bc"),
    ("a b c + aa cb bc", "a b c + ab bc abc ca"),
)
LONGEST = 4
"""Tokens of the longest text that a toy teacher writes."""
KINDS: dict[str, type[ToyModel]] = {"canonical": CanonicalModel, "any": ToyModel}


def sampled(model: ToyModel, rng: np.random.Generator, longest: int) -> list[int]:
    """Ids that the model wrote, without a stop id."""
    ids: list[int] = []
    while len(ids) < longest:
        prob = torch.softmax(model.row(ids), -1).numpy()
        token = int(rng.choice(prob.size, p=prob / prob.sum()))
        if token in model.vocabulary.stop_ids:
            break
        ids.append(token)
    return ids


def viewed(pair: VocabularyPair, ids: Sequence[int], student: ToyModel, teacher: ToyModel) -> LossInputs:
    """The inputs of one text that stopped."""
    tokenized = pair.student.decode(ids)
    whole = np.array([*ids, pair.student.stop_ids[0]], np.int32)
    text = AlignedText(whole, tokenized, pair.to_teacher(tokenized), True)
    rows, rows_T = (
        GivenLogits(model.states(own.tolist(), own.size + 1))
        for model, own in ((student, text.student.ids), (teacher, text.teacher.ids))
    )
    return LossInputs(AlignedBatch([text], pair, CPU), rows, rows_T)


def toy_bytes(name: str, kind: str, seeds: int) -> dict[str, Any]:
    """Byte tables of toy models against all segmentations, along texts that the models wrote."""
    vocabulary = TOYS[name]
    pair, rng, errors = VocabularyPair(vocabulary, vocabulary), np.random.default_rng(0), []
    for seed in range(seeds):
        model = KINDS[kind](vocabulary, seed, never=("<junk>",), scale=1.5)
        ids = sampled(model, rng, 6)
        inputs = viewed(pair, ids, model, model)
        table, _, _ = byte_tables(inputs.student, inputs.batch.student.layout)
        data = inputs.batch.texts[0].student.data
        exact = marginals(toy_prob(model), vocabulary, pair.student_trie, ids, data)
        errors.append(byte_errors(table, exact))
    return {"vocabulary": name, "segmentations": kind, **summary(errors, EXACT_TOY)}


def toy_prefix(mine: str, theirs: str, kind: str, seeds: int) -> dict[str, Any]:
    """Prefix targets of toy teachers against all segmentations, and against the student's own tokens of their texts."""
    pair = VocabularyPair(TOYS[mine], TOYS[theirs])
    rng = np.random.default_rng(0)
    states: dict[str, list[dict[str, Probs]]] = {"synced": [], "interior": []}
    for seed in range(seeds):
        teacher = KINDS[kind](pair.teacher, seed, never=("<junk>",), scale=1.5, longest=LONGEST)
        text = pair.teacher.decode(sampled(teacher, rng, LONGEST)).data
        while (
            len(pair.teacher.encode(text)) > LONGEST
        ):  # a text of which the teacher's own tokens have no probability
            text = pair.teacher.decode(sampled(teacher, rng, LONGEST)).data
        ids = pair.student.encode(text).ids.tolist()
        inputs = viewed(pair, ids, ToyModel(pair.student, seed), teacher)
        found = prefix_errors(inputs, toy_prob(teacher), partial(own_tokens, inputs, all_texts(teacher)))
        for name, chosen in (("synced", found["synced"] > 0), ("interior", found["synced"] == 0)):
            if chosen.any():
                states[name].append({k: v[chosen] for k, v in found.items() if k != "synced"})
    tables = {name: summary(errors, EXACT_TOY) for name, errors in states.items() if errors}
    return {"student": mine, "teacher": theirs, "segmentations": kind, **tables}


def all_texts(model: ToyModel) -> dict[bytes, float]:
    """Every text that the model can write, with its probability."""
    found: dict[bytes, float] = {}
    open_: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_:
        ids, weight = open_.pop()
        for v, prob in enumerate(torch.softmax(model.row(ids), -1).tolist()):
            if v in model.vocabulary.stop_ids:
                text = b"".join(model.vocabulary.token_bytes(i) for i in ids)
                found[text] = found.get(text, 0.0) + weight * prob
            elif prob > 0.0:
                open_.append(((*ids, v), weight * prob))
    return found


def own_tokens(inputs: LossInputs, texts: dict[bytes, float], e: int, observed: int) -> Probs:
    """The events at byte e of a student that writes exactly these texts, always in its tokenizer's own tokens."""
    pair = inputs.batch.vocabularies
    pieces, size = pair.pieces, pair.pieces.ids.size
    text = inputs.batch.texts[0].student
    row = text.starts.tolist().index(e) if e in text.starts.tolist() else None
    token = text.data[e : int(text.ends[row])] if row is not None and observed >= 0 else None
    prob = np.zeros(size + 4)
    for data, weight in texts.items():
        if not data.startswith(text.data[:e]):
            continue
        if len(data) == e:
            prob[size] += weight
            continue
        ids = pair.student.encode(data)
        at = int(np.searchsorted(ids.ends, e, side="right"))
        left = data[e : int(ids.ends[at])]
        piece = pieces.at_S[pair.student.offsets[int(ids.ids[at])] + e - int(ids.starts[at])]
        is_token = observed == size + OBSERVED and token is not None and left.startswith(token)
        prob[observed if is_token and pieces.lengths[piece] < len(token or b"") else piece] += weight
    total: Probs = prob / prob.sum()
    return total


def prefix_errors(
    inputs: LossInputs,
    next_prob: NextProb,
    law: Callable[[int, int], Probs] | None = None,
    **limits: Any,
) -> dict[str, Probs]:
    """By state of the student, how far the teacher's target is from the same events summed over all segmentations.

    ``tv``, ``excess``: as of bytes, before the share of the sampled token is moved; ``moved``: that share, and
    ``moved_error`` its distance from the exact one; ``tv_own_tokens``: of the whole target from what ``law`` says.
    ``synced``: 1 where a token of the teacher begins too.
    """
    batch, pair = inputs.batch, inputs.batch.vocabularies
    positions = prefix_positions(batch, interior=True, where="everywhere")
    pieces = batch.piece_batch(positions)
    span = slice(0, len(pieces))
    needed = needed_rows(pieces.teacher, span)
    rows = inputs.teacher_rows.select(needed)
    with torch.no_grad():
        nothing_apart = torch.full_like(pieces.short, -1)
        joint = piece_events(rows, needed, pieces.teacher, nothing_apart, span).joint
        whole, _, moved = piece_target(rows, needed, pieces, span)
    shares = torch.softmax(joint.double(), -1).numpy()
    target, size = shares[:, :-1] / shares[:, :-1].sum(-1, keepdims=True), pair.pieces.ids.size
    text = batch.texts[0]
    ends = dict(zip(text.student.starts.tolist(), text.student.ends.tolist(), strict=True))
    observed = pieces.observed.tolist()
    spans = [(e, ends[e]) for e, event in zip(positions.tolist(), observed, strict=True) if event >= 0]
    exact = marginals(
        next_prob,
        pair.teacher,
        pair.teacher_trie,
        text.teacher.ids.tolist(),
        text.teacher.data,
        pieces_at=pair.pieces.at_T,
        columns=size + 4,
        positions=positions.tolist(),
        spans=spans,
        **limits,
    )
    found: dict[str, list[float]] = {}
    for p, e in enumerate(positions.tolist()):
        truth = exact.pieces[e] / exact.prefix[e]
        share = float(moved[p])
        true_share = (
            (exact.prefix[ends[e]] - exact.along[e, ends[e]]) / exact.prefix[e] if observed[p] >= 0 else 0.0
        )
        values = {
            "tv": 0.5 * float(np.abs(target[p] - truth[:-1]).sum()),
            "excess": float(np.maximum(shares[p, :-1] - truth[:-1], 0.0).sum()),
            "rest": float(shares[p, -1]),
            "other_pasts": float(exact.other_pasts[e]),
            "left_out": float(exact.left_out[e]),
            "moved": share,
            "moved_error": abs(share - true_share),
            "synced": float(e in (0, *text.teacher.ends.tolist())),
        }
        if law is not None:
            values["tv_own_tokens"] = 0.5 * float(np.abs(whole[p].exp().numpy() - law(e, observed[p])).sum())
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


# Real models.


def real(names: Sequence[str], limits: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Byte tables of each model along given texts and along its own samples, and prefix targets of both directions."""
    models = {name: load_model(model_path(name), device="cpu") for name in names}
    found: dict[str, Any] = {"bytes": [], "prefix": []}
    for name, model in models.items():
        for source, texts in (("given", given_texts(model)), ("sampled", own_samples(model))):
            rows = []
            for prompt, ids in texts:
                errors, row = real_bytes(model, prompt, ids, limits)
                rows.append((errors, row))
                say(f"{name}: {row['text']!r}, {row['sequences']} other sequences")
            whole = summary([errors for errors, _ in rows], EXACT_REAL)
            found["bytes"].append(
                {"model": name, "texts": source, **whole, "by_text": [row for _, row in rows]}
            )
    for mine, theirs in permutations(names, 2):
        found["prefix"].append(
            {"student": mine, "teacher": theirs, **real_prefix(models[mine], models[theirs], limits)}
        )
        say(f"{mine} ← {theirs}: prefix targets")
    return found


def given_texts(model: LanguageModel) -> list[tuple[list[int], list[int]]]:
    """Prompts and texts in the model's own tokens."""
    encode = model.tokenizer
    return [
        (encode(p)["input_ids"], model.vocabulary.encode(t, at_start=False).ids.tolist()) for p, t in TEXTS
    ]


def own_samples(model: LanguageModel) -> list[tuple[list[int], list[int]]]:
    """The same prompts, and what the model writes behind them, as sampled, up to a special token."""
    prompts = [Prompt(key=str(i), text=prompt) for i, (prompt, _) in enumerate(TEXTS)]
    seeds = [(0, i) for i in range(len(prompts))]
    texts = []
    for rollout in sample(HuggingFaceEngine(model), model, prompts, Sampling(max_new_tokens=12), seeds=seeds):
        events = np.flatnonzero(model.vocabulary.is_special[rollout.ids])
        ids = rollout.ids[: int(events[0])] if events.size else rollout.ids
        texts.append((list(rollout.prompt_ids), ids.tolist()))
    return texts


def real_bytes(
    model: LanguageModel, prompt: Sequence[int], ids: Sequence[int], limits: dict[str, Any]
) -> tuple[dict[str, Probs], dict[str, Any]]:
    """The errors of the byte table along the ids, and what a reader wants to know of this text."""
    vocabulary, pair = model.vocabulary, VocabularyPair(model.vocabulary, model.vocabulary)
    tokenized = vocabulary.decode(ids, at_start=False)
    whole = np.array([*ids, vocabulary.stop_ids[0]], np.int32)
    layout = AlignedBatch([AlignedText(whole, tokenized, tokenized, True)], pair, CPU).student.layout
    rows = states_along(model, prompt, tokenized.ids)
    with torch.no_grad():
        table, _, _ = byte_tables(rows, layout)
    exact = marginals(
        model_prob(model, prompt), vocabulary, pair.student_trie, list(ids), tokenized.data, **limits
    )
    errors = byte_errors(table.double(), exact)
    means = {name: float(errors[name].mean()) for name in ("tv", "tv_last_state", "rest", "other_pasts")}
    text = tokenized.data.decode("utf-8", "replace")
    return errors, {"text": text, "sequences": exact.sequences, **means}


def real_prefix(student: LanguageModel, teacher: LanguageModel, limits: dict[str, Any]) -> dict[str, Any]:
    """The errors of a teacher's prefix targets along the given texts in the student's own tokens."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    targets = []
    for prompt, completion in TEXTS:
        tokenized = pair.student.encode(completion, at_start=False)
        whole = np.append(tokenized.ids, pair.student.stop_ids[0]).astype(np.int32)
        text = AlignedText(whole, tokenized, pair.to_teacher(tokenized, at_start=False), True)
        prompts = [m.tokenizer(prompt)["input_ids"] for m in (student, teacher)]
        rows, rows_T = (
            states_along(student, prompts[0], text.student.ids),
            states_along(teacher, prompts[1], text.teacher.ids),
        )
        inputs = LossInputs(AlignedBatch([text], pair, CPU), rows, rows_T)
        targets.append(prefix_errors(inputs, model_prob(teacher, prompts[1]), **limits))
    states: dict[str, Any] = {}
    for name, wanted in (("synced", 1.0), ("interior", 0.0)):
        chosen = [{k: v[t["synced"] == wanted] for k, v in t.items() if k != "synced"} for t in targets]
        if any(c["tv"].size for c in chosen):
            states[name] = summary(chosen, EXACT_REAL)
    return states


def report(data: dict[str, Any]) -> str:
    """The record as lines for a person."""
    lines = [
        "byte tables",
        f"{'':<52}{'positions':>9}{'exact':>8}{'to rest':>8}{'tv':>9}{'max':>8}{'rest':>8}{'other pasts':>13}",
    ]

    def line(title: str, row: dict[str, Any]) -> str:
        return (
            f"{title:<52}{row['positions']:>9}{row['share_exact']:>8.1%}"
            f"{row['share_exact_up_to_rest']:>8.1%}{row['tv']['mean']:>9.2g}"
            f"{row['tv']['max']:>8.2g}{row['rest']['mean']:>8.2g}{row['other_pasts']['mean']:>13.2g}"
        )

    for where in ("toys", "real"):
        rows = data.get(where, {}).get("bytes", [])
        lines += [
            line(f"{r.get('model') or r['vocabulary']} {r.get('texts') or r['segmentations']}", r)
            for r in rows
        ]
    lines.append("prefix targets")
    for where in ("toys", "real"):
        for row in data.get(where, {}).get("prefix", []):
            title = f"{row['student']} ← {row['teacher']} {row.get('segmentations', '')}"
            for states in ("synced", "interior"):
                if states in row:
                    own = row[states].get("tv_own_tokens")
                    end = f"   from its own tokens {own['mean']:.2g}" if own else ""
                    lines.append(line(f"{title} {states}"[:52], row[states]) + end)
    return "\n".join(lines)


def record_divergence(command: str, started: float, folder: Path, say: Callable[[str], None]) -> int:
    """Exit status; the record is results/divergence.json."""
    try:
        found = divergence.divergences(MODELS, say)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(divergence.report(found))
    seconds = time.perf_counter() - started
    device = device_name(threads=1)
    data = {"directions": found, "levels": list(divergence.LEVELS)}
    print(write_record("divergence", data, command=command, seconds=seconds, device=device, folder=folder))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Exit status; the record is results/exactness.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks exactness", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=12, help="toy models of each kind")
    parser.add_argument("--window", type=int, default=16, help="bytes after which another past is left")
    parser.add_argument(
        "--least", type=float, default=1e-6, help="share of the text's probability that is followed"
    )
    parser.add_argument("--toys", action="store_true", help="toy models alone, and no record")
    parser.add_argument(
        "--divergence",
        action="store_true",
        help="the divergence of real models per byte alone, and its record",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    command = " ".join(["python -m benchmarks exactness", *arguments])
    if options.divergence:
        return record_divergence(command, started, options.out, say)
    toys = {
        "bytes": [toy_bytes(name, kind, options.seeds) for name in TOYS for kind in KINDS],
        "prefix": [toy_prefix(*pair, kind, options.seeds) for pair in TOY_PAIRS for kind in KINDS],
    }
    if options.toys:
        print(report({"toys": toys}))
        return 0
    try:
        data = {
            "least": options.least,
            "window_bytes": options.window,
            "exact_below": {"toys": EXACT_TOY, "real": EXACT_REAL},
            "texts": [list(t) for t in TEXTS],
            "toys": toys,
            "real": real(MODELS, {"least": options.least, "window": options.window}, say),
        }
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(data))
    print(
        write_record(
            "exactness",
            data,
            command=command,
            seconds=time.perf_counter() - started,
            device=device_name(threads=1),
            folder=options.out,
        )
    )
    return 0
