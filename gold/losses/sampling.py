"""What objectives ask of the way in which completions are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gold.losses.table import find


def unfit_sampling(
    objectives: Mapping[str, Mapping[str, Any]],
    *,
    temperature: float,
    top_p: float,
    num_generations: int,
    on_policy: float,
) -> Iterator[str]:
    """One line for each way in which these objectives, options by name, cannot be learned from completions drawn so;
    it begins with the key that is about it."""
    if "reward" in objectives and num_generations == 1:
        yield "rollout.num_generations: reward compares completions of one prompt: it needs at least 2, got 1"
    if "sft" in objectives and on_policy == 1:
        yield "rollout.on_policy: sft learns the data's completions, and at 1 none is used: set it below 1"
    for name in sorted(name for name in objectives if find(name).on_policy):
        if on_policy == 0:
            yield f"rollout.on_policy: {name} needs completions that the student writes, got 0"
        if top_p != 1:
            yield (
                f"rollout.top_p: {name} is a policy gradient of all that the student may write, and no weight brings "
                f"back what is never drawn: set it to 1, got {top_p:g}"
            )
        if temperature == 0:
            yield f"rollout.temperature: {name} needs completions that are drawn: set it to 1, got 0"
        elif temperature != 1 and objectives[name].get("importance_cap") is None:
            yield (
                f"rollout.temperature: {name} is a policy gradient of the distribution that is sampled, and the "
                "policy is the one at temperature 1: set it to 1, or give the objective an importance_cap, got "
                f"{temperature:g}"
            )
