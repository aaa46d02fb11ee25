"""Divergences on pieces: against their definition, against next bytes, against every segmentation, at the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.tokenizers import byte_level_bpe, character_level, sentencepiece_bpe
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.bytes.events import STOP_EVENT
from gold.kernels import projection
from gold.kernels.logits import GivenLogits, LazyLogits, TopKLogits
from gold.kernels.tables import byte_tables
from gold.losses import DIVERGENCES, OBJECTIVES, LossInputs
from gold.losses.prefix import prefix_positions
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import (
    CPU,
    ToyModel,
    aligned,
    batch_of,
    inputs_of,
    random_texts,
    student_rows,
    teacher_rows,
    toy_vocabulary,
)

MERGED = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)
OTHER = toy_vocabulary(["a+a", "b+a", "ba+a"])
LETTERS = toy_vocabulary([], cut=None)
PAIRS = {
    "merged from other": VocabularyPair(MERGED, OTHER),
    "other from merged": VocabularyPair(OTHER, MERGED),
    "merged from letters": VocabularyPair(MERGED, LETTERS),
    "letters from merged": VocabularyPair(LETTERS, MERGED),
    "merged from long": VocabularyPair(MERGED, toy_vocabulary(["b+a", "b+ba"], cut=None)),
    "three from three": VocabularyPair(
        toy_vocabulary(["a+b", "ab+b"], letters="abc", cut=None),
        toy_vocabulary(["b+c", "a+bc"], letters="abc", cut=None),
    ),
    "merged from itself": VocabularyPair(MERGED, MERGED),
}
over = pytest.mark.parametrize("name", sorted(PAIRS))


def spelled(vocabulary: Vocabulary) -> list[bytes | None]:
    return [vocabulary.token_bytes(i) or None for i in range(vocabulary.size)]


def piece_row(
    tokens: Sequence[bytes | None],
    stop_ids: Sequence[int],
    prob: Tensor,
    ids: Sequence[int],
    text: bytes,
    e: int,
    known: set[bytes],
    apart: bytes | None,
) -> dict[object, float]:
    """Masses of the events at byte e by the definition: every state before, every token, one at a time."""
    masses: dict[object, float] = {}
    weight, begin = 1.0, 0
    for k in range(prob.shape[0]):
        if begin > e:
            break
        read = text[begin:e]
        end = begin + len(tokens[ids[k]] or b"") if k < len(ids) else None
        for v in range(prob.shape[1]):
            token = tokens[v] if v < len(tokens) else None
            event: object = None
            if v in stop_ids:
                event = "stop" if begin == e else None
            elif token is None or token == read:
                if (token is not None or begin == e) and not (k < len(ids) and v == ids[k] and end == e):
                    event = "rest"
            elif token.startswith(read):
                left = token[len(read) :]
                event = oracle.longest(known, left) or "residual"
                if apart and left.startswith(apart) and event == (oracle.longest(known, apart) or "residual"):
                    event = "observed"
            if event is not None:
                masses[event] = masses.get(event, 0.0) + weight * float(prob[k, v])
        if k < len(ids):
            weight, begin = weight * float(prob[k, ids[k]]), begin + len(tokens[ids[k]] or b"")
    return masses


def path_mass(
    tokens: Sequence[bytes | None], prob: Tensor, ids: Sequence[int], text: bytes, e: int, stop: int
) -> tuple[float, bytes]:
    """The mass of ``text[e:stop]`` along the tokens that begin behind e, and how the one across e goes on."""
    mass, weight, begin, first = 0.0, 1.0, 0, b""
    for k, token in enumerate(ids):
        end = begin + len(tokens[token] or b"")
        if begin > e and begin < stop:
            left = text[begin:stop]
            starts = [v for v, t in enumerate(tokens) if t is not None and t.startswith(left)]
            mass += weight * sum(float(prob[k, v]) for v in starts)
        if begin <= e < end:
            first = text[e:end]
        weight, begin = weight * float(prob[k, token]), end
    return mass, first


def expected_events(pair: VocabularyPair, text: AlignedText, models, e: int) -> tuple[dict, dict, float]:
    """The student's events at byte e, the teacher's with the sampled token's own, and how much of them was moved."""
    mine, theirs = spelled(pair.student), spelled(pair.teacher)
    known = oracle.pieces(mine, theirs)
    prob, prob_T = (torch.softmax(rows, -1) for rows in models)
    data = text.student.data
    sampled = next((i for i, s in enumerate(text.student.starts.tolist()) if s == e), None)
    token = None if sampled is None else data[e : int(text.student.ends[sampled])]
    inside = token is not None and any(e < s < e + len(token) for s in text.teacher.starts.tolist())
    apart = token if inside and token not in known else None
    row = piece_row(mine, pair.student.stop_ids, prob, text.student.ids.tolist(), data, e, known, apart)
    row_T = piece_row(theirs, pair.teacher.stop_ids, prob_T, text.teacher.ids.tolist(), data, e, known, apart)
    moved = 0.0
    if inside:
        assert token is not None
        moved, first = path_mass(theirs, prob_T, text.teacher.ids.tolist(), data, e, e + len(token))
        source = oracle.longest(known, first) or "residual"
        goal = "observed" if apart else token
        row_T[source] -= moved
        row_T[goal] = row_T.get(goal, 0.0) + moved
    total, total_T = sum(row.values()), sum(row_T.values())
    return (
        {k: v / total for k, v in row.items()},
        {k: v / total_T for k, v in row_T.items()},
        moved / total_T,
    )


def computed_events(inputs: LossInputs, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of both sides' events at the positions, and what was moved."""
    batch = inputs.batch.piece_batch(positions)
    everything = slice(0, len(batch))
    if not len(batch):
        return torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0)
    needed, needed_T = (projection.needed_rows(s, everything) for s in (batch.student, batch.teacher))
    joint, _ = projection.piece_events(
        inputs.student.select(needed), needed, batch.student, batch.short, everything
    )
    logq, _, moved = projection.piece_target(
        inputs.teacher_rows.select(needed_T), needed_T, batch, everything
    )
    return joint - torch.logsumexp(joint, -1, keepdim=True), logq, moved


def column(pair: VocabularyPair, event: object) -> int:
    names = {"stop": 0, "observed": 1, "residual": 2, "rest": 3}
    ids = [pair.student.token_bytes(int(i)) for i in pair.pieces.ids]
    return len(ids) + names[event] if event in names else ids.index(event)  # type: ignore[index, arg-type]


@over
def test_events_are_those_of_the_definition(name):
    pair = PAIRS[name]
    moved_somewhere = False
    for seed in range(4):
        texts = random_texts(pair, 6, seed)
        student, teacher = ToyModel(pair.student, 3, extra=2), ToyModel(pair.teacher, 4)
        inputs = inputs_of(pair, texts, student, teacher)
        positions = prefix_positions(inputs.batch, interior=True, where="everywhere")
        mine, theirs, moved = computed_events(inputs, positions)
        for p, position in enumerate(positions.tolist()):
            b = int(np.searchsorted(inputs.batch.student.position_starts, position, "right")) - 1
            e = position - int(inputs.batch.student.position_starts[b])
            models = student_rows(student, texts[b : b + 1]), teacher_rows(teacher, texts[b : b + 1])
            row, row_T, share = expected_events(pair, texts[b], models, e)
            assert float(moved[p]) == pytest.approx(share, rel=1e-9, abs=1e-15)
            moved_somewhere |= share > 0
            for got, expected in ((mine[p], row), (theirs[p], row_T)):
                dense = torch.zeros_like(got)
                for event, mass in expected.items():
                    dense[column(pair, event)] += mass
                torch.testing.assert_close(got.exp(), dense, rtol=1e-9, atol=1e-14)
    assert moved_somewhere == (name not in ("merged from itself", "letters from merged"))


# Against next bytes: pieces and the sampled token by their first byte.

FAMILIES = {
    "bpe": Vocabulary.load(byte_level_bpe(), stop_ids=[1]),
    "digits": Vocabulary.load(byte_level_bpe(digits=True, vocab_size=350), stop_ids=[1]),
    "characters": Vocabulary.load(character_level(), stop_ids=[1]),
    "fallback": Vocabulary.load(sentencepiece_bpe(), stop_ids=[1]),
    "dummy space": Vocabulary.load(sentencepiece_bpe(prefix="prepend"), stop_ids=[1]),
}


@cache
def family_pair(mine: str, theirs: str) -> VocabularyPair:
    return VocabularyPair(FAMILIES[mine], FAMILIES[theirs])


def states(count: int, width: int, seed: int) -> Tensor:
    return 2 * torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from(sorted(FAMILIES)), st.data(), st.booleans())
def test_events_begin_with_the_bytes_of_the_byte_table(mine, theirs, data, stopped):
    """Whatever was sampled: no canonical ids, no valid UTF-8, special tokens inside, spaces put in front."""
    pair = family_pair(mine, theirs)
    token = st.integers(0, pair.student.size - 1).filter(lambda i: i != 1)
    ids = data.draw(st.lists(token, max_size=8))
    tokenized = pair.student.decode(ids)
    whole = np.array([*ids, 1] if stopped else ids, np.int32)
    batch = AlignedBatch([AlignedText(whole, tokenized, pair.to_teacher(tokenized), stopped)], pair, CPU)
    rows, rows_T = int(batch.student.row_starts[-1]), int(batch.teacher.row_starts[-1])
    logits = states(rows, pair.student.size, 1).requires_grad_(True)
    inputs = LossInputs(
        batch,
        GivenLogits(logits),
        GivenLogits(states(rows_T, pair.teacher.size, 2)),
    )
    loss = OBJECTIVES["forward_kl"](support="prefix", interior=True)(inputs)
    assert 0 <= loss.total.item() < 50 * max(rows, 1)
    if not len(prefix_positions(batch, interior=True, where="everywhere")):
        return
    grad = torch.autograd.grad(loss.total, logits)[0] if loss.total.requires_grad else torch.zeros(1)
    assert torch.isfinite(grad).all()

    positions = prefix_positions(batch, interior=True, where="everywhere")
    mine_E, theirs_E, _ = computed_events(inputs, positions)
    text = tokenized.data
    for events, side_rows, layout in (
        (mine_E, inputs.student, batch.student.layout),
        (theirs_E, inputs.teacher_rows, batch.teacher.layout),
    ):
        table = byte_tables(side_rows, layout)[0][positions].detach().exp()
        prob = events.detach().exp()
        expected = torch.zeros(len(positions), 258, dtype=torch.float64)
        first = [pair.student.token_bytes(int(i))[0] for i in pair.pieces.ids]
        expected.index_add_(1, torch.tensor(first), prob[:, : len(first)])
        stop, observed, residual, rest = prob[:, len(first) :].T
        for p, e in enumerate(positions.tolist()):
            if e < len(text):
                expected[p, text[e]] += observed[p]
            else:
                assert observed[p] == 0
        expected[:, STOP_EVENT] = stop
        expected[:, 257] = rest
        unnamed = torch.ones(256, dtype=torch.bool)
        unnamed[first] = False
        torch.testing.assert_close(table[:, :256][:, unnamed].sum(-1), residual, rtol=1e-9, atol=1e-12)
        named = torch.cat((~unnamed, torch.ones(2, dtype=torch.bool)))
        torch.testing.assert_close(expected[:, named], table[:, named], rtol=1e-9, atol=1e-12)


# Against every segmentation of the text.


def law(
    pair: VocabularyPair, model: ToyModel, side: Vocabulary, text: bytes, e: int, token: bytes | None
) -> dict[object, float]:
    """The events at byte e of a text by all token sequences, those of several tokens for the sampled one its own."""
    known = oracle.pieces(spelled(pair.student), spelled(pair.teacher))
    tokens = spelled(side)

    def prob(ids: tuple[int, ...]) -> Tensor:
        return torch.softmax(model.row(ids), -1)

    masses: dict[object, float] = {}
    for weight, ids, begin in oracle.readings(prob, tokens, text[:e], side.stop_ids):
        last = tokens[ids[-1]]
        event: object = "stop" if last is None else oracle.longest(known, last[e - begin :])
        masses[event] = masses.get(event, 0.0) + weight
    if token:
        goal = token if token in known else "observed"
        for weight, ids, begin in oracle.readings(prob, tokens, text[: e + len(token) - 1], side.stop_ids):
            ends = np.cumsum([len(tokens[i] or b"") for i in ids]).tolist()
            if tokens[ids[-1]] is None or tokens[ids[-1]][e + len(token) - 1 - begin] != token[-1]:
                continue
            first = next(i for i, end in enumerate(ends) if end > e)
            event = oracle.longest(known, tokens[ids[first]][e - (ends[first] - len(tokens[ids[first]])) :])
            if goal == "observed" and first == len(ids) - 1 and event == oracle.longest(known, token):
                masses["observed"] = masses.get("observed", 0.0) + weight
                masses[event] -= weight
            elif ends[first] < e + len(token):
                masses[goal] = masses.get(goal, 0.0) + weight
                masses[event] -= weight
    total = sum(masses.values())
    return {event: mass / total for event, mass in masses.items()}


@over
def test_events_are_exact_where_no_other_segmentation_of_the_past_has_mass(name):
    """Against all token sequences; the rest of the byte table says where there were others."""
    pair = PAIRS[name]
    exact = positions_seen = 0
    for seed in range(6):
        models = [ToyModel(v, seed, never=("<junk>",)) for v in (pair.student, pair.teacher)]
        texts = random_texts(pair, 3, seed, longest=5)
        inputs = inputs_of(pair, texts, *models)
        positions = prefix_positions(inputs.batch, interior=True, where="everywhere")
        computed = computed_events(inputs, positions)
        for side, layout, rows, model, vocabulary in (
            (0, inputs.batch.student.layout, inputs.student, models[0], pair.student),
            (1, inputs.batch.teacher.layout, inputs.teacher_rows, models[1], pair.teacher),
        ):
            rest = byte_tables(rows, layout)[0][:, 257].exp()
            for p, position in enumerate(positions.tolist()):
                b = int(np.searchsorted(inputs.batch.student.position_starts, position, "right")) - 1
                start = int(inputs.batch.student.position_starts[b])
                e, text = position - start, texts[b].student
                row = next((i for i, s in enumerate(text.starts.tolist()) if s == e), None)
                token = None if row is None else text.data[e : int(text.ends[row])]
                inside = token and any(e < s < e + len(token) for s in texts[b].teacher.starts.tolist())
                until = position + (len(token) if side and inside and token else 1)
                positions_seen += 1
                if rest[start:until].max() > 1e-12:
                    continue
                expected = law(pair, model, vocabulary, text.data, e, token if side and inside else None)
                if not side and computed[0][p, column(pair, "observed")] > -torch.inf:
                    continue  # told apart: against the definition above
                dense = torch.zeros(computed[side].shape[1], dtype=torch.float64)
                for event, mass in expected.items():
                    dense[column(pair, event)] += mass
                torch.testing.assert_close(computed[side][p].exp(), dense, rtol=1e-9, atol=1e-12)
                exact += 1
    assert exact > positions_seen / 4


# At the edges.


@pytest.mark.parametrize("kind", sorted(DIVERGENCES))
def test_every_divergence_can_be_taken(kind):
    """Nothing to learn from an equal model; something finite from another, and from one that rules tokens out."""
    objective = OBJECTIVES[kind](support="prefix", interior=True)
    same, other = PAIRS["merged from itself"], PAIRS["other from merged"]
    model = ToyModel(MERGED, 3, extra=2)
    assert abs(float(objective(inputs_of(same, random_texts(same, 8, 1), model, model)).total)) < 1e-12
    texts = random_texts(other, 6, 1)
    student = student_rows(ToyModel(OTHER, 3), texts).requires_grad_(True)
    teacher = teacher_rows(ToyModel(MERGED, 4), texts)
    certain = torch.full_like(teacher, -torch.inf)
    certain[:, MERGED.encode("a").ids[0]] = 0.0
    for rows in (teacher, torch.where(teacher > 0, teacher, -torch.inf), certain):
        value = objective(inputs_of(other, texts, student, rows)).total
        (grad,) = torch.autograd.grad(value, student)
        assert 0 < value.item() < 20 * len(student)
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 1e-3


def known_only(logits: Tensor, k: int) -> LazyLogits:
    """The rows as a server would send them: the k likeliest tokens of each."""
    logp, ids = torch.log_softmax(logits, -1).topk(k, dim=-1)
    return TopKLogits(ids, logp, logits.shape[1])


@over
def test_of_teachers_that_know_their_likeliest_tokens_the_others_are_rest(name):
    pair = PAIRS[name]
    texts = random_texts(pair, 6, 1)
    inputs = inputs_of(pair, texts, ToyModel(pair.student, 3), ToyModel(pair.teacher, 4))
    rows = teacher_rows(ToyModel(pair.teacher, 4), texts)
    objective = OBJECTIVES["reverse_kl"](support="prefix", interior=True)
    whole = objective(inputs).total.item()
    known = replace(inputs, teacher=known_only(rows, rows.shape[1]))
    assert objective(known).total.item() == pytest.approx(whole, rel=1e-4)
    logits = inputs.student.logits().requires_grad_(True)
    for k in (1, 2, 4):
        value = objective(replace(inputs, teacher=known_only(rows, k))).total
        assert 0 <= value.item() < 100
        assert torch.isfinite(torch.autograd.grad(value, logits)[0]).all()
    positions = prefix_positions(inputs.batch, interior=True, where="everywhere")
    _, target, _ = computed_events(replace(inputs, teacher=known_only(rows, 2)), positions)
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(len(positions), dtype=torch.float64))


def test_a_token_on_the_path_that_is_not_known_weighs_as_much_as_all_unknown_ones():
    """Of ``a·a`` the first row knows ``ab`` alone, the second ``a`` alone."""
    pair = PAIRS["letters from merged"]
    text = aligned(pair, LETTERS.encode("aa").ids.tolist())
    assert [MERGED.token_bytes(int(i)) for i in text.teacher.ids] == [b"a", b"a"]
    known = torch.tensor([[int(MERGED.encode("ab").ids[0])], [int(MERGED.encode("a").ids[0])]])
    teacher = TopKLogits(known, torch.tensor([[0.6], [0.9]]).double().log(), MERGED.size)
    inputs = inputs_of(pair, [text], ToyModel(LETTERS, 1), torch.zeros(2, MERGED.size))
    _, target, _ = computed_events(replace(inputs, teacher=teacher), torch.tensor([1]))
    expected = {b"b": 0.6, b"a": 0.4 * 0.9, "rest": 0.4 * 0.1}
    for event, prob in expected.items():
        assert target[0, column(pair, event)].exp().item() == pytest.approx(prob, rel=1e-6)


def test_mass_that_a_student_cannot_spell_is_counted():
    """A student without spaces, before a text with none: what the teacher would begin with a space is residual."""
    poor = toy_vocabulary(["a+b"], letters="ab", cut=None)
    pair = VocabularyPair(poor, LETTERS)
    texts = [aligned(pair, [*poor.encode("aab").ids.tolist(), poor.stop_ids[0]])]
    teacher = teacher_rows(ToyModel(LETTERS, 4), texts)
    loss = OBJECTIVES["reverse_kl"](support="prefix")(inputs_of(pair, texts, ToyModel(poor, 3), teacher))
    space = int(LETTERS.encode(" ").ids[0])
    at = [0, 1, 3]  # a, ab, stop: the states that both begin at
    expected = torch.softmax(teacher, -1)[at, space].sum()
    assert loss.parts["teacher_unmatched_mass"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss.total.item() > 0
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize("choice", ["keep", "mask"])
def test_targets_of_white_space_alone_are_counted_and_may_be_left_out(choice):
    pair = PAIRS["merged from letters"]
    texts = [aligned(pair, MERGED.encode("a b").ids.tolist())]
    teacher = teacher_rows(ToyModel(LETTERS, 4), texts)
    space = int(LETTERS.encode(" ").ids[0])
    teacher[1] = torch.where(torch.arange(teacher.shape[1]) == space, 20.0, -20.0)
    student = student_rows(ToyModel(MERGED, 3), texts).requires_grad_(True)
    objective = OBJECTIVES["forward_kl"](support="prefix", white_space=choice)
    inputs = inputs_of(pair, texts, student, teacher)
    loss = objective(inputs)
    assert objective.count(inputs.batch) == 3
    assert loss.parts["white_space_share"].item() == 1
    (grad,) = torch.autograd.grad(loss.total, student)
    assert (grad[1].abs().max() > 1e-6) == (choice == "keep")
    # The state before it is not alone in the row of the next: its cover terms see it.
    assert grad[0].abs().max() > 1e-6
    assert grad[2].abs().max() > 1e-6


def test_the_example_of_the_documentation():
    student, teacher = (toy_vocabulary(m, letters="ab", cut=None) for m in (["a+b"], []))
    pair = VocabularyPair(student, teacher)

    def row(vocabulary: Vocabulary, **prob: float) -> Tensor:
        logits = torch.full((vocabulary.size,), -torch.inf, dtype=torch.float64)
        for token, p in prob.items():
            index = vocabulary.stop_ids[0] if token == "stop" else vocabulary.tokenizer.token_to_id(token)
            logits[index] = np.log(p)
        return logits

    before = row(student, a=0.5, b=0.1, ab=0.3, stop=0.1)
    mine = torch.stack((before, before))
    theirs = torch.stack((row(teacher, a=0.6, b=0.3, stop=0.1), row(teacher, b=0.7, stop=0.3)))
    for token, expected, expected_T in (
        ("ab", [0.5, 0.1, 0.1, 0.3], [0.18, 0.3, 0.1, 0.42]),
        ("b", [0.8, 0.1, 0.1, 0.0], [0.6, 0.3, 0.1, 0.0]),
    ):
        text = aligned(pair, [student.tokenizer.token_to_id(token)])
        inputs = inputs_of(pair, [text], mine[:1], theirs[: len(token)])
        events, events_T, _ = computed_events(inputs, torch.tensor([0]))
        assert events[0, :4].exp().tolist() == pytest.approx(expected, abs=1e-12)
        assert events_T[0, :4].exp().tolist() == pytest.approx(expected_T, abs=1e-12)


def test_which_states_are_compared():
    """``a·ab·b·stop`` over ``a·a·b·b``, read by the teacher as ``aa·b·b``: both begin at bytes 0, 3 and 4."""
    pair = VocabularyPair(toy_vocabulary(["a+b"], cut=None), toy_vocabulary(["a+a"], cut=None))
    ids = [pair.student.encode(t).ids[0] for t in ("a", "ab", "b")]
    batch = batch_of(pair, [aligned(pair, [*ids, pair.student.stop_ids[0]])])
    assert prefix_positions(batch, interior=False, where="everywhere").tolist() == [0, 3, 4]
    assert prefix_positions(batch, interior=True, where="everywhere").tolist() == [0, 1, 3, 4]
    assert prefix_positions(batch, interior=True, where="one_to_one").tolist() == [3, 4]
    cut = batch_of(pair, [aligned(pair, ids)])
    assert prefix_positions(cut, interior=True, where="everywhere").tolist() == [0, 1, 3]


def test_nothing_to_compare_is_nothing():
    pair = VocabularyPair(toy_vocabulary(["a+b"], cut=None), toy_vocabulary(["b+a"], cut=None))
    text = aligned(pair, [int(i) for t in ("ab", "a") for i in pair.student.encode(t).ids])
    inputs = inputs_of(pair, [text], ToyModel(pair.student, 1), ToyModel(pair.teacher, 2))
    objective = OBJECTIVES["reverse_kl"](support="prefix", where="one_to_one")
    assert objective.count(inputs.batch) == 0
    loss = objective(inputs)
    assert loss.total.item() == 0
    assert {name: part.item() for name, part in loss.parts.items()} == dict.fromkeys(loss.parts, 0.0)


def test_a_better_student_is_nearer_to_the_teacher():
    """What the target asks for can be reached: the student's own token for the teacher's two."""
    pair = PAIRS["merged from letters"]
    texts = [aligned(pair, [int(MERGED.encode("ab").ids[0])])]
    teacher = torch.full((2, LETTERS.size), -20.0, dtype=torch.float64)
    for row, letter in enumerate("ab"):
        teacher[row, int(LETTERS.encode(letter).ids[0])] = 20.0
    values = []
    for liked in ("ab", "a", "b"):
        student = torch.full((1, MERGED.size), -8.0, dtype=torch.float64)
        student[0, int(MERGED.encode(liked).ids[0])] = 8.0
        values.append(
            OBJECTIVES["reverse_kl"](support="prefix")(inputs_of(pair, texts, student, teacher)).total.item()
        )
    assert values[0] < 1e-2
    assert values[1] > 1
    assert values[2] > 1
