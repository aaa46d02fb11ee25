"""The roles of special tokens: from the user, from the tokenizer's settings, or from its chat template."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from gold.errors import VocabularyError

# Ends of turns in well-known families, for templates that cannot be rendered here.
_TURN_ENDS = (
    *("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<|end_of_turn|>"),
)
# Words that no template contains, strips or truncates.
_QUESTION, _ANSWER = "QuestionOfTheUser", "AnswerOfTheAssistant"


@dataclass(frozen=True)
class Roles:
    """Special tokens by role, as token strings given by the user. None: use the tokenizer's files.

    `stop` replaces all stop ids found, `bos` the token in front of a text, `pad` the padding token of batches.
    """

    stop: Sequence[str] | None = None
    bos: str | None = None
    pad: str | None = None


def id_of_role(tokenizer: Tokenizer, role: str, token: str, name: str) -> int:
    """The id of the token that the user named for a role.

    Raises: VocabularyError if the tokenizer lacks it.
    """
    index: int | None = tokenizer.token_to_id(token)
    if index is None:
        known = [added.content for added in tokenizer.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(token, known, n=1)
        instead = f"did you mean {near[0]!r}?" if near else "give one of its tokens as it writes it"
        raise VocabularyError(f"roles.{role}: {name} has no token {token!r}; {instead}")
    return index


def token_content(token: Any) -> str | None:
    """The string of a special token in settings: a string, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def default_template(templates: Any) -> str | None:
    """The chat template in the settings: the only one, or the default among several by name."""
    if isinstance(templates, list):
        templates = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) and templates else None


def turn_ends(template: str | None, settings: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The id of the added token that a chat template writes after an assistant's answer; empty if it writes none.

    A question and an answer are rendered; if nothing follows the answer, a second question is appended (some families
    end a turn by beginning the next one). `settings` hold the template's variables such as `bos_token`. If the template
    cannot be rendered, the well-known turn ends that occur in it are used.
    """
    if template is None:
        return ()
    named = {name: token_content(token) for name, token in settings.items() if str(name).endswith("_token")}
    tokens = {name: token for name, token in named.items() if token is not None}
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    conversation = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION)]
    texts = [_rendered(template, tokens, turns) for turns in (conversation[:2], conversation)]
    for text in filter(None, texts):
        rest = text.rpartition(_ANSWER)[2].lstrip()
        found = [t for t in added if t and t != tokens.get("bos_token") and rest.startswith(t)]
        if found:
            return (added[max(found, key=len)],)
    if any(texts):
        return ()
    return tuple(added[token] for token in _TURN_ENDS if token in added and token in template)


def _rendered(template: str, tokens: Mapping[str, str], turns: Sequence[tuple[str, str]]) -> str | None:
    """The conversation, its contents as strings or else as lists of parts; None if the template rejects both."""
    from gold.tokenize.sandbox import compiled_template

    for parts in (False, True):
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in turns
        ]
        try:
            text: str = compiled_template(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **tokens
            )
        except Exception:  # errors of Jinja and of the template
            continue
        if _ANSWER in text:
            return text
    return None
