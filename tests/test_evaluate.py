from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gold.comparison import bootstrap_ratio
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.evaluate import EvaluationPlan, evaluate, wilson
from gold.inspect.measures import measure_lines
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.teachers import LocalTeacher

TASK = RunningSums()
PROMPTS = TASK.prompts("heldout", 5, 0)
PLAN = EvaluationPlan(num_generations=2, max_new_tokens=10, samples=2)


def words(seed):
    tokenizer = word_tokenizer([f"{p.text}{p.completion}" for p in TASK.prompts("train", 200, 0)])
    return tiny_model(tokenizer, "words", layers=1, seed=seed)


def characters(seed):
    return tiny_model(character_tokenizer(), "characters", layers=1, seed=seed)


def sequence_logp(model, prompt_ids, ids):
    with torch.no_grad():
        logp = torch.log_softmax(model.lm(torch.tensor([[*prompt_ids, *ids]])).logits[0].double(), -1)
    return sum(logp[len(prompt_ids) - 1 + k, i].item() for k, i in enumerate(ids))


def test_a_model_is_no_distance_from_itself():
    model = words(0)
    found = evaluate(model, LocalTeacher(words(0)), PROMPTS, plan=PLAN, verifier=TASK).measures
    for name in ("reverse_kl_per_byte", "forward_kl_per_byte"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    # Sampled special tokens have no width and share a chunk with their neighbour.
    assert 0.5 < found["one_to_one_share"] <= 1
    assert found["canonical_share"] <= 1


def test_measures_do_not_depend_on_the_batches():
    student, teacher = words(0), LocalTeacher(characters(1))
    found = evaluate(student, teacher, PROMPTS, plan=replace(PLAN, micro_batch_size=64)).measures
    by_tokens = evaluate(student, teacher, PROMPTS, plan=replace(PLAN, micro_batch_tokens=40)).measures
    assert by_tokens == pytest.approx(found, rel=1e-4)


def beginning_logp(model, prompt_ids, tokenized):
    """Log-probability of all texts that begin with the bytes of a text: by its tokens up to some one, and any token
    from there on that reaches the end."""
    data, ids = tokenized.data, tokenized.ids.tolist()
    with torch.no_grad():
        logp = torch.log_softmax(model.lm(torch.tensor([[*prompt_ids, *ids]])).logits[0].double(), -1)
    rows, total, before = logp[len(prompt_ids) - 1 :], 0.0, 0.0
    for k, start in enumerate(tokenized.starts.tolist()):
        reach = [
            v
            for v in range(model.vocabulary.size)
            if model.vocabulary.token_bytes(v).startswith(data[start:])
        ]
        total += sum(math.exp(before + rows[k, v].item()) for v in reach if start < len(data))
        before += rows[k, ids[k]].item()
    return math.log(total)


@pytest.mark.parametrize("longest", [3, 10])
@pytest.mark.parametrize(("mine", "theirs"), [(words, characters), (characters, words)])
def test_reverse_kl_per_byte_is_its_definition(longest, mine, theirs):
    """Log-probabilities of the sampled ids by one, and of the teacher's own ids of the same bytes by the other; of
    texts that were cut off, of all texts that begin so."""
    student, teacher = mine(0), theirs(1)
    plan = replace(PLAN, max_new_tokens=longest)
    found = evaluate(student, LocalTeacher(teacher), PROMPTS, plan=plan).measures
    repeated = [p for p in PROMPTS for _ in range(2)]
    seeds = [(0, 2**31, n) for n in range(len(repeated))]
    rollouts = sample(
        HuggingFaceEngine(student), student, repeated, Sampling(max_new_tokens=longest), seeds=seeds
    )
    gap = size = 0.0
    for rollout in rollouts:
        data = rollout.tokenized.data
        read = teacher.vocabulary.encode(data)
        prompt = teacher.tokenizer(rollout.prompt.text)["input_ids"]
        if rollout.stopped:
            stops = list(teacher.vocabulary.stop_ids)
            gap += sequence_logp(student, rollout.prompt_ids, rollout.ids.tolist())
            gap -= sequence_logp(teacher, prompt, [*read.ids.tolist(), *stops])
        elif data:
            gap += beginning_logp(student, rollout.prompt_ids, rollout.tokenized)
            gap -= beginning_logp(teacher, prompt, read)
        size += len(data)
    assert not all(r.stopped for r in rollouts)
    assert found["reverse_kl_per_byte"] == pytest.approx(gap / size, rel=1e-4)
    assert (
        found["reverse_kl_per_byte_low"] <= found["reverse_kl_per_byte"] <= found["reverse_kl_per_byte_high"]
    )
    assert "bounded_share" not in found
    assert found["stop_rate"] == np.mean([r.stopped for r in rollouts])
    assert found["length_bytes"] == np.mean([len(r.tokenized.data) for r in rollouts])


EXACT = replace(PLAN, branches=1e-3)


def test_exact_measures_are_added_and_change_no_other():
    student, teacher = words(0), LocalTeacher(characters(1))
    before = evaluate(student, teacher, PROMPTS, plan=PLAN).measures
    student.lm.train()
    found = evaluate(student, teacher, PROMPTS, plan=EXACT).measures
    assert student.lm.training
    assert {name: found[name] for name in before} == before
    for direction in ("reverse", "forward"):
        exact, least = f"exact_{direction}_kl_per_byte", f"least_{direction}_kl_per_byte"
        assert 0 <= found[least] <= found[exact]
        assert found[f"{exact}_low"] <= found[exact] <= found[f"{exact}_high"]
        assert found[exact] == pytest.approx(found[f"{direction}_kl_per_byte"], rel=0.5)
        # Averaged over what the next byte may be, the divergence scatters less than a log-ratio of samples.
        widths = [
            found[f"{name}_high"] - found[f"{name}_low"] for name in (exact, f"{direction}_kl_per_byte")
        ]
        assert widths[0] < widths[1]
    assert 0 <= found["teacher_unresolved_mass"] <= found["unresolved_mass"] < 0.01
    assert found["branches_per_token"] > 0


def test_a_model_is_at_zero_of_itself_in_exact_measures():
    found = evaluate(words(0), LocalTeacher(words(0)), PROMPTS, plan=EXACT).measures
    for name in ("exact_reverse_kl_per_byte", "least_reverse_kl_per_byte", "exact_forward_kl_per_byte"):
        assert found[name] == pytest.approx(0, abs=1e-6)


def test_bits_per_byte_are_those_of_the_given_completions():
    student = words(0)
    found = evaluate(student, None, PROMPTS, plan=PLAN).measures
    bits = size = 0.0
    for prompt in PROMPTS:
        ids = student.vocabulary.encode(prompt.completion).ids.tolist()
        bits -= sequence_logp(student, student.tokenizer(prompt.text)["input_ids"], [*ids, 2]) / math.log(2)
        size += len(prompt.completion)
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert "reverse_kl_per_byte" not in found
    assert "accuracy" not in found


def test_samples_show_both_sides_of_every_chunk():
    result = evaluate(words(0), LocalTeacher(characters(1)), PROMPTS, plan=PLAN, verifier=TASK)
    assert len(result.samples) == 2
    for shown, prompt in zip(result.samples, PROMPTS, strict=False):
        assert shown["prompt"] == prompt.text
        texts = [c["text"] for c in shown["chunks"] if c["text"] is not None]
        assert "".join(texts) == shown["completion"]
        assert shown["stopped"] == (shown["chunks"][-1:] != [] and shown["chunks"][-1]["text"] is None)
        assert all(c["student"] <= 0 and c["teacher"] <= 0 for c in shown["chunks"])
        for c in shown["chunks"]:
            for side in ("student", "teacher"):
                tokens = c.get(f"{side}_tokens", [(c["text"], c[side])])
                assert sum(logp for _, logp in tokens) == pytest.approx(c[side], abs=1e-3)
                if c["text"] is not None:
                    assert "".join(text for text, _ in tokens) == c["text"]
            likeliest = [logp for _, logp in c["alternatives"]]
            assert len(likeliest) == 4
            assert likeliest == sorted(likeliest, reverse=True)
            # The first token of the chunk, if it is among them, has the probability that the chunk's record says.
            first = c.get("teacher_tokens", [(c["text"], c["teacher"])])[0]
            assert all(
                logp == pytest.approx(first[1], abs=1e-3)
                for text, logp in c["alternatives"]
                if text == first[0]
            )
            assert likeliest[0] >= first[1] - 1e-3 or c["text"] is None


def test_wilson_interval_holds_what_it_says():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson score interval, worked by hand
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    rng = np.random.default_rng(0)
    inside = [
        low <= 0.3 <= high for low, high in (wilson(int(rng.binomial(60, 0.3)), 60) for _ in range(2000))
    ]
    assert 0.92 < np.mean(inside) < 0.98


def test_one_prompt_has_no_interval():
    for numbers in ([], [3.0], [1.0, np.inf]):
        assert np.isnan(bootstrap_ratio(np.array(numbers), np.ones(len(numbers)), 0)).all()
    given = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75}
    given |= {
        "reverse_kl_per_byte": 0.5,
        "reverse_kl_per_byte_low": np.nan,
        "reverse_kl_per_byte_high": np.nan,
    }
    accuracy, divergence = measure_lines(given)
    assert accuracy.endswith("50.0 %          95 %: 25.0 to 75.0")
    assert divergence.endswith("0.5000 nats/byte")


def test_bootstrap_interval_covers_the_ratio():
    rng = np.random.default_rng(1)
    inside = []
    for n in range(200):
        size = rng.integers(5, 50, 60).astype(float)
        low, high = bootstrap_ratio(0.2 * size + rng.normal(0, 3, 60), size, n, draws=300)
        inside.append(low <= 0.2 <= high)
    assert 0.87 < np.mean(inside) <= 1
