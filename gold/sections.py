"""Settings that training and evaluation share, with their defaults."""

from __future__ import annotations

from gold.schema import CountInt, PositiveFloat, PositiveInt, Section, Share


class CompletionSettings(Section):
    """How completions are generated, in training and in evaluations."""

    max_new_tokens: PositiveInt = 128
    """length limit of a completion, in student tokens"""
    generation_batch_size: PositiveInt = 32
    """sequences generated together"""


class EvaluationSettings(Section):
    """What an evaluation generates and scores for its prompts."""

    num_generations: PositiveInt = 1
    """completions per prompt"""
    samples: CountInt = 4
    """prompts whose completions and signal are written to samples.jsonl"""
    micro_batch_size: PositiveInt = 16
    """sequences per forward pass"""
    micro_batch_tokens: PositiveInt | None = None
    """instead of micro_batch_size: most tokens per forward pass, prompts and padding included"""
    branches: Share | None = None
    """exact divergence per byte: the least share of the text so far of a token off its path that is followed; 0: not
    measured; null: 0.01 in `gold eval` with local teachers, else 0"""


class Limits(Section):
    """Limits of a conversation with an environment."""

    max_turns: PositiveInt = 8
    """most turns of the student"""
    max_tokens: PositiveInt | None = None
    """most student tokens of a conversation, prompts and turns together; null: the student's context"""
    timeout_s: PositiveFloat = 60.0
    """time limit of each answer and each score of the environment"""
