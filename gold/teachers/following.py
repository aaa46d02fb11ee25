"""The likeliest next tokens behind a prompt, from vLLM: unlike log-probabilities of the prompt itself, they are told
where its prefix cache holds the prompt, so that only what is new is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gold.http import BadAnswerError, Call, shown
from gold.teachers.dialects import MOST_ABOVE_ONE, NEVER_NATS, TokenLogp

_PREFIX = "token_id:"


def following(model: str, ids: Sequence[int], top_k: int) -> Call:
    """The request for the ``top_k`` likeliest tokens behind ``ids``; its result is a ``TokenLogp``.

    One token is generated and ignored; its alternatives are the model's own log-probabilities, whatever the sampling.
    """
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 1.0,
        "logprobs": top_k,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }

    def read(answer: Any) -> TokenLogp:
        choice = answer["choices"][0]
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and list(echoed) != list(ids):
            raise BadAnswerError("has read other tokens than were sent")
        found = {}
        for name, logp in choice["logprobs"]["top_logprobs"][0].items():
            number = name.removeprefix(_PREFIX)
            if number == name or not (number.isascii() and number.isdecimal()):
                raise BadAnswerError(f"gives {shown(name)} as a token id")
            if type(logp) not in (int, float) or not logp <= MOST_ABOVE_ONE:
                raise BadAnswerError(f"gives {shown(logp)} as a log-probability")
            if logp > NEVER_NATS:
                found[int(number)] = float(logp)
        mass = math.fsum(map(math.exp, found.values()))
        if not found or mass > 1 + MOST_ABOVE_ONE:
            raise BadAnswerError(f"gives tokens of {mass:.4g} probability together")
        return found

    return Call("/v1/completions", body, read)
