"""Draws conversations: turns of the student, answers of an environment, until each has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gold.data import LazyPrompts, Prompt, lacking_messages
from gold.environments.calling import Caller
from gold.environments.protocol import Conversation, Environment, Limits, tools_of
from gold.errors import DataError
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request, rollout_of
from gold.rollout.types import Rollout, Sampling, Seed, Turn
from gold.tasks import score_of
from gold.tokenize.conversation import PromptIds, SampledTurn, TemplateForm, conversation_ids, opens_thinking
from gold.turns import TurnPrompt, check_messages, read_turn

Generate = Callable[[Sequence[Request]], list[Generation]]


@dataclass
class DrawnConversation:
    """A conversation with its rollouts, one for each turn; ``problem`` is why it ended early, if that needs a word."""

    seen: Conversation
    rollouts: list[Rollout] = field(default_factory=list)
    score: float | None = None
    problem: str = ""


@dataclass
class _Live:
    """A conversation under way."""

    found: DrawnConversation
    seed: Seed
    prompt: TurnPrompt
    ids: PromptIds
    request: Request
    sampled: dict[int, SampledTurn] = field(default_factory=dict)


class Conversations:
    """Draws the conversations of prompts with one environment: in rounds, one turn of every conversation in each.

    The first turn of a conversation has its own seed, and so draws what a run of one turn draws; turn t after it has
    that seed and t.
    """

    def __init__(
        self,
        model: LanguageModel,
        environment: Environment,
        limits: Limits,
        caller: Caller,
    ) -> None:
        self.model, self.environment, self.limits, self.caller = model, environment, limits, caller
        self.tools = tools_of(environment)
        vocabulary = model.vocabulary
        self.form = TemplateForm.of(model.tokenizer, model.rendering)
        self.stops = tuple(vocabulary.label(index) for index in vocabulary.stop_ids)

    @classmethod
    def of(
        cls, model: LanguageModel, environment: Environment | None, limits: Limits
    ) -> Conversations | None:
        """What draws a model's conversations; None without an environment."""
        return None if environment is None else cls(model, environment, limits, Caller(limits.timeout_s))

    def draw(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Seed],
        sampling: Sampling,
        generate: Generate,
        *,
        any_process: Callable[[bool], bool] = bool,
    ) -> list[DrawnConversation]:
        """One conversation per prompt, in order. ``any_process``: whether a value is true in any of the processes that
        generate together.

        Raises:
            DataError: a prompt leaves no room in the model's context; the message names its key.
            GoldError: any error of the engine.
        """
        live = [self._begun(prompt, seed, sampling) for prompt, seed in zip(prompts, seeds, strict=True)]
        conversations = [one.found for one in live]
        for turn in range(self.limits.max_turns):
            if not any_process(bool(live)):
                break
            drawn = generate([one.request for one in live])
            for one, answer in zip(live, drawn, strict=True):
                self._add_turn(one, answer)
            live = [one for one in live if one.found.seen.ended is None]
            live = self._answered(live, turn + 1)
        self._scored(conversations)
        for found in conversations:
            _check_counts(found)
        return conversations

    def _begun(self, prompt: Prompt, seed: Seed, sampling: Sampling) -> _Live:
        turn = as_turn(prompt, self.tools)
        messages = tuple(dict(message) for message in turn.messages or ())
        ids = conversation_ids(
            self.model.tokenizer,
            messages,
            {},
            stops=self.stops,
            tools=turn.tools,
            rendering=self.model.rendering,
        )
        seen = Conversation(prompt, [dict(message) for message in messages], seed)
        return _Live(DrawnConversation(seen), seed, turn, ids, self._request(ids, seed, sampling))

    def _request(self, ids: PromptIds, seed: Seed, sampling: Sampling) -> Request:
        return Request(ids.ids, seed, sampling, self.model.vocabulary.stop_ids)

    def _add_turn(self, one: _Live, drawn: Generation) -> None:
        """Adds a turn of the student."""
        found, seen = one.found, one.found.seen
        rollout = rollout_of(self.model, one.prompt, one.request, drawn)
        tokenized = rollout.tokenized
        written = read_turn(tokenized.data, opened=opens_thinking(one.ids.opening))
        seen.turns.append(written)
        if not one.prompt.tools:
            written = written.without_calls
        found.rollouts.append(replace(rollout, turn=Turn(len(found.rollouts), written)))
        one.sampled[len(seen.messages)] = SampledTurn(tokenized.ids, tokenized.ends, written, one.ids)
        message = written.message()
        if "reasoning_content" in message:
            message["keep_thinking"] = not self.form.strips
        seen.messages.append(message)
        if not drawn.stopped:
            seen.ended = "cut"

    def _answered(self, live: list[_Live], turn: int) -> list[_Live]:
        """The conversations that go on, after the environment's answers."""
        replies = self.caller.results([partial(self.environment.reply, one.found.seen) for one in live])
        going_on = []
        for one, reply in zip(live, replies, strict=True):
            found = one.found
            if isinstance(reply, BaseException):
                _fail(found, reply)
            elif reply is None:
                found.seen.ended = "done"
            elif turn == self.limits.max_turns:
                found.seen.ended = "max_turns"
            elif self._goes_on(one, reply, turn):
                going_on.append(one)
        return going_on

    def _goes_on(self, one: _Live, reply: Any, turn: int) -> bool:
        """Adds the environment's messages; whether there is room for another turn."""
        seen = one.found.seen
        try:
            if isinstance(reply, str | bytes) or not isinstance(reply, Sequence):
                raise DataError(
                    f"the environment replied {reply!r:.80}; expected a list of messages, or None"
                )
            check_messages(reply)
            if reply[-1]["role"] == "assistant":
                raise DataError("the environment replied with a turn of the assistant")
            added = [dict(message) for message in reply]
            ids = self._next_ids(one, [*seen.messages, *added])
        except DataError as error:
            _fail(one.found, error)
            return False
        if ids is None:
            seen.ended = "max_tokens"
            return False
        seen.messages += added
        one.ids, one.request = ids, self._request(ids, (*one.seed, turn), one.request.sampling)
        one.prompt = replace(one.prompt, messages=tuple(dict(message) for message in seen.messages))
        return True

    def _next_ids(self, one: _Live, messages: Sequence[dict[str, Any]]) -> PromptIds | None:
        """The ids of the next prompt; None if they leave no room for another turn."""
        most = min(self.model.context, self.limits.max_tokens or self.model.context)
        room = most - one.request.sampling.max_new_tokens
        if sum(len(message["content"]) for message in messages) > 64 * max(room, 1):
            return None  # no tokenizer makes one token of so many characters
        ids = conversation_ids(
            self.model.tokenizer,
            messages,
            one.sampled,
            stops=self.stops,
            tools=one.prompt.tools,
            rendering=self.model.rendering,
        )
        return ids if len(ids.ids) <= room else None

    def _scored(self, conversations: Sequence[DrawnConversation]) -> None:
        whole = [found for found in conversations if found.seen.ended != "error"]
        scores = self.caller.results([partial(self.environment.score, found.seen) for found in whole])
        for found, score in zip(whole, scores, strict=True):
            if isinstance(score, BaseException):
                _fail(found, score)
            elif score is not None:
                try:
                    found.score = score_of(score)
                except DataError as error:
                    _fail(found, DataError(f"the environment scored {error}, or None"))


def _check_counts(found: DrawnConversation) -> None:
    """Leaves out what an environment counts if it cannot be summed, as an error of the environment."""
    seen = found.seen
    try:
        seen.counts = Counter({str(name): score_of(n) for name, n in seen.counts.items()})
    except (AttributeError, DataError):
        seen.counts, counted = Counter(), seen.counts
        _fail(found, DataError(f"the environment counts {counted!r:.80}; expected finite numbers by name"))


def _fail(found: DrawnConversation, error: BaseException) -> None:
    """Ends a conversation whose environment failed."""
    what = " ".join(" ".join(map(str, error.args)).split()) or "no reason given"
    kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
    if isinstance(error, TimeoutError):
        kind, what = "", "the environment did not answer in environment.timeout_s"
    found.seen.ended, found.problem = "error", f"prompt {found.seen.prompt.key}: {kind}{what}"


class TurnPrompts(LazyPrompts):
    """Prompts as those of the first turns of an environment's conversations, each made when it is asked for.

    Raises:
        DataError: one has no messages.
    """

    def __init__(self, prompts: Sequence[Prompt], environment: Environment) -> None:
        self.prompts, self.environment = prompts, environment
        if (text := lacking_messages(prompts)) is not None:
            as_turn(text)

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, place: int) -> Prompt:
        """The prompt of a place."""
        tools, instructions = tools_of(self.environment), getattr(self.environment, "instructions", "")
        return as_turn(self.prompts[place], tools, instructions)


def as_turn(prompt: Prompt, tools: Sequence[Any] = (), instructions: str = "") -> TurnPrompt:
    """A prompt as that of the first turn of a conversation, with ``instructions`` at the end of its system message.

    Raises:
        DataError: it has no messages.
    """
    if isinstance(prompt, TurnPrompt):
        return prompt
    if prompt.messages is None:
        raise DataError(
            f"prompt {prompt.key}: an environment needs conversations, and this is a plain text; give it as messages"
        )
    messages = list(prompt.messages)
    if instructions and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{instructions}"}
    elif instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    return TurnPrompt(
        prompt.key,
        messages=tuple(messages),
        completion=prompt.completion,
        reference=prompt.reference,
        teacher_context=prompt.teacher_context,
        route=prompt.route,
        weight=prompt.weight,
        tools=tuple(tools),
        given=len(messages),
    )
