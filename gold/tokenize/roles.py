"""The roles of special tokens: those that a user names, and what a chat template writes after an assistant's answer."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from gold.errors import VocabularyError
from gold.tokenize.sandbox import compiled_template

# How turns end in the families that we know, for templates that cannot be rendered here.
_TURN_ENDS = (
    "<|im_end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|return|>",
    "<|end_of_turn|>",
)
# Words that no template knows, trims or cuts.
_QUESTION, _ANSWER = "QuestionOfTheUser", "AnswerOfTheAssistant"


@dataclass(frozen=True)
class Roles:
    """Special tokens by role, as a user names them: token strings. None leaves a role to the tokenizer's files.

    `stop` takes the place of all stop ids that were found, `bos` that of the token in front of a text, `pad` that of
    the token that fills batches.
    """

    stop: Sequence[str] | None = None
    bos: str | None = None
    pad: str | None = None


def id_of_role(tokenizer: Tokenizer, role: str, token: str, name: str) -> int:
    """The id of a token that a user named for a role.

    Raises: VocabularyError if the tokenizer does not have it.
    """
    index: int | None = tokenizer.token_to_id(token)
    if index is None:
        known = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(token, known, n=1)
        instead = f"did you mean {near[0]!r}?" if near else "give one of its tokens as it writes it"
        raise VocabularyError(f"roles.{role}: {name} has no token {token!r}; {instead}")
    return index


def turn_ends(template: str, tokens: Mapping[str, str], added: Mapping[str, int]) -> tuple[int, ...]:
    """The ids of the added token that a chat template writes after an assistant's answer, none if it writes none.

    A question and an answer are rendered, and if nothing follows the answer there, with a second question behind it
    (some families end a turn by beginning the next one). `tokens` are the template's variables such as `bos_token`,
    `added` the ids of all added tokens. Of a template that cannot be rendered, the endings that it mentions are taken.
    """
    conversation = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)]
    endings = [token for token in added if token and token != tokens.get("bos_token")]
    try:
        compiled = compiled_template(template)
        texts = [_rendered(compiled, tokens, turns) for turns in (conversation[:2], conversation)]
    except Exception:  # whatever Jinja finds wrong with it
        texts = []
    for text in filter(None, texts):
        rest = text.rpartition(_ANSWER)[2].lstrip()
        found = [token for token in endings if rest.startswith(token)]
        if found:
            return (added[max(found, key=len)],)
    if any(texts):
        return ()
    return tuple(added[token] for token in _TURN_ENDS if token in added and token in template)


def _rendered(template: Any, tokens: Mapping[str, str], turns: Sequence[tuple[str, str]]) -> str | None:
    """The conversation with the answer in it, its contents as texts or else as lists of parts; None if it refuses."""
    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in turns
        ]
        try:
            text: str = template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **tokens
            )
        except Exception:  # Jinja's errors, and whatever a template raises
            continue
        if _ANSWER in text:
            return text
    return None
