"""Checks of a served teacher: tokenization, number of top tokens, reproducibility of its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from urllib.parse import urlsplit

import torch

from gold.align.model_inputs import student_states
from gold.data import Prompt
from gold.doctor.finding import Check, Finding, failure, passed, run_checks, warning
from gold.doctor.sample import JUDGED, SAMPLE
from gold.doctor.weights import divergence
from gold.errors import DataError, TeacherError
from gold.http import RefusedError, is_near
from gold.kernels.lm_head import token_logp
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.rollout.engine import completed
from gold.teachers.dialects import TokenLogp
from gold.teachers.served import ServedTeacher
from gold.tokenize.chat import has_chat_template, prompt_ids, prompt_text
from gold.tokenize.templates import Rendering

MOST_NOISE = 0.01
"""Warn above, in nats per byte: the spread of answers to the same request. Near the end of a run, the remaining reverse
KL is some hundredths; 16-bit servers with dynamic batching stay well below this.
"""
MOST_OWN_KL = 5e-3
"""Fail above, in nats per byte: KL between the student and the same model on the server. A server in bfloat16 was 0.001
from the same weights in float32; other weights, templates or positions are above 0.05.
"""
MOST_NOISE_SHARE = 0.1
"""Warn above: the spread as a share of the distance between student and teacher; from 1 on nothing is learned."""
_TIMES = 3
_PROBES = 4
_PROBE_CHARACTERS = 256
_KEEP_ALL = (
    "make it keep unlikely tokens: vLLM cuts them off with --logprobs-mode processed_logprobs and a top_p or top_k; "
    "nothing is learned from texts of probability 0"
)
_REPRODUCIBLE = "let one replica answer, in one dtype, with kernels that do not depend on the batch"


@dataclass(frozen=True)
class _Served:
    """A teacher, a run's prompts, and the short probe texts sent to it."""

    teacher: ServedTeacher
    prompts: Sequence[Prompt]
    probes: Sequence[Prompt]
    student: LanguageModel | None = None
    answer: Sequence[TokenLogp] = ()  # for the first probe, token by token

    @classmethod
    def of(cls, teacher: ServedTeacher, prompts: Sequence[Prompt], student: LanguageModel | None) -> _Served:
        return cls(teacher, prompts, _probes(teacher, prompts), student)

    def answers(self, times: int) -> tuple[int, list[list[float]]]:
        """The probes' size in bytes, and each answer's log-probabilities of the sent tokens, ``times`` per probe."""
        texts = [self.teacher.vocabulary.encode(p.completion or "") for p in self.probes]
        both = zip(self.probes, texts, strict=True)
        asked = [self.teacher.request(p, t.ids.tolist(), times > 1) for p, t in both]
        answers = self.teacher.token_logp([each for each in asked for _ in range(times)])
        return max(1, sum(len(t.data) for t in texts)), [list(map(_first, answer)) for answer in answers]


def _first(known: TokenLogp) -> float:
    """The log-probability of the sent token, which comes first."""
    return next(iter(known.values()))


def examine_server(teacher: ServedTeacher, prompts: Sequence[Prompt] = ()) -> list[Finding]:
    """Findings on a server: whether it answers, returns enough top tokens, and tokenizes like the tokenizer files.

    The tokenizations of texts and of messages are compared.

    Raises:
        TeacherError: it does not answer.
    """
    teacher.learn_context()
    probes = _probes(teacher, prompts)
    ids = teacher.vocabulary.encode(probes[0].completion or "").ids
    try:
        (answer,) = teacher.token_logp([teacher.request(probes[0], ids.tolist(), True)])
    except RefusedError as error:
        advice = teacher.dialect.advice if "logprobs" in str(error) else "see docs/served-teacher.md"
        return [Finding("server", "fail", str(error), advice)]
    return run_checks(SERVER_CHECKS, _Served(teacher, prompts, probes, answer=answer))


def examine_noise(
    teacher: ServedTeacher, prompts: Sequence[Prompt] = (), student: LanguageModel | None = None
) -> Finding:
    """A finding on how much answers to the same request differ, in nats per byte.

    With ``student``, it is compared with the difference between student and teacher on the same texts.

    Raises:
        TeacherError: the server does not answer.
    """
    return run_checks(STUDENT_CHECKS[:1], _Served.of(teacher, prompts, student))[0]


def examine_own(teacher: ServedTeacher, prompts: Sequence[Prompt], student: LanguageModel) -> Finding:
    """A finding on whether a server of the student's model agrees with the student in this process, in nats per byte.

    The larger of two measures: the reverse KL, token by token, on the tokens that the server returns plus the tail
    mass; and half the squared difference of the log-probabilities of the texts' own tokens, which is that KL to second
    order, and works for servers that return no other tokens.

    Raises:
        TeacherError: the server does not answer.
    """
    return run_checks(STUDENT_CHECKS[1:], _Served.of(teacher, prompts, student))[0]


def compare_with_student(
    teacher: ServedTeacher, prompts: Sequence[Prompt], student: LanguageModel, *, is_student: bool
) -> list[Finding]:
    """``examine_noise``, and ``examine_own`` if the server serves the student itself."""
    return run_checks(STUDENT_CHECKS[: 1 + is_student], _Served.of(teacher, prompts, student))


def _noise(served: _Served) -> Finding:
    teacher, student = served.teacher, served.student
    size, logp = served.answers(_TIMES)
    same = [logp[n : n + _TIMES] for n in range(0, len(logp), _TIMES)]
    # A token with probability 0 in every answer does not differ.
    noise = sum(max(v) - min(v) for each in same for v in zip(*each, strict=True) if min(v) < max(v)) / size
    found = f"{_TIMES} answers to the same request differ by {noise:.2g} nats per byte"
    if teacher.bypasses_cache:
        found += "; it answers zeros for tokens in its prefix cache, which requests avoid from now on"
        return warning(found, f"start it with {teacher.dialect.uncached}")
    loud = noise > MOST_NOISE
    if student is not None:
        own = [_total_logp(student, probe) for probe in served.probes]
        signal = sum(abs(sum(each[0]) - logp) for each, logp in zip(same, own, strict=True)) / size
        found += f"; student and teacher differ by {signal:.2g}"
        loud = loud or noise > MOST_NOISE_SHARE * max(signal, MOST_NOISE)
        if noise > max(signal, MOST_NOISE):
            return failure(found, _REPRODUCIBLE)
    return warning(found, _REPRODUCIBLE) if loud else passed(found)


def _own(served: _Served) -> Finding:
    teacher, student = served.teacher, served.student
    assert student is not None
    try:
        value = divergence(student, teacher, served.probes, "shared")
        own = [_text_logp(student, probe) for probe in served.probes]
    except DataError as error:
        return warning(f"not compared: {error}", "shorten the longest prompts")
    size, answers = served.answers(1)
    squares = 0.0
    for mine, answer in zip(own, answers, strict=True):
        theirs = torch.tensor(answer, dtype=torch.float64)
        squares += float((mine[:-1] - theirs).square().sum()) if len(mine) == len(theirs) + 1 else math.inf
    value = max(value, squares / 2 / size)
    found = f"KL of the student from itself as it is served: {value:.1g} nats per byte"
    if value <= MOST_OWN_KL:
        return passed(found)
    return failure(
        found,
        f"it must be below {MOST_OWN_KL:g}: serve the weights of {teacher.path}, not quantised and in one dtype; "
        "if another model is served, name its own folder in teacher.path",
    )


def _top_k(served: _Served) -> Finding:
    teacher = served.teacher
    most = max(map(len, served.answer))
    enough = most >= min(teacher.top_k, teacher.vocabulary.size)
    few = f"gives {most} tokens a position where top_k is {teacher.top_k}"
    if lost := sum(_first(known) == -math.inf for known in served.answer):
        found = f"gives probability 0 to {lost} of the {len(served.answer)} tokens of a plain text"
        return warning(found, _KEEP_ALL) if enough else failure(f"{found}, and {few}", _KEEP_ALL)
    if enough:
        stops = ", and all stop ids" if teacher.dialect.chosen else ""
        return passed(f"gives {teacher.gives} at each position{stops}")
    # The OpenAI dialect drops strings that several tokens share.
    return (warning if teacher.api == "openai" else failure)(few, teacher.dialect.advice)


def _tokenization(served: _Served) -> Finding:
    teacher = served.teacher
    texts = [p.completion or "" for p in served.probes]
    texts += [text for kind in SAMPLE.values() for text in kind[:2]]
    # A server may reject a text without tokens.
    texts = [text for text in texts if teacher.vocabulary.encode(text).ids.size]
    try:
        answers = teacher.server.ask([teacher.dialect.tokenize(teacher.served_model, text) for text in texts])
    except RefusedError as error:
        return warning(f"not compared: {error}", "make sure that the tokenizers are the same")
    for text, theirs in zip(texts, answers, strict=True):
        ids = teacher.vocabulary.encode(text).ids.tolist()
        if not teacher.dialect.same_tokens(ids, theirs):
            return failure(
                f"the server reads {text[:40]!r} as {theirs[:8]}…, the tokenizer at {teacher.path} as {ids[:8]}…",
                "set teacher.path to the tokenizer of the model that is served",
            )
    return passed(f"{len(texts)} texts give the same tokens as the tokenizer at {teacher.path}")


def _template(served: _Served) -> list[Finding]:
    teacher = served.teacher
    talk = next((p for p in served.prompts if p.messages is not None), None)
    if talk is None or not has_chat_template(teacher.tokenizer):
        return []
    arguments = teacher.rendering.arguments
    if (call := teacher.dialect.template(teacher.served_model, talk.messages or (), arguments)) is None:
        return []
    try:
        (theirs,) = teacher.server.ask([call])
    except RefusedError as error:
        return [
            warning(f"not compared: {error}", "compare with the server's chat template yourself", "messages")
        ]
    # The server writes today's date, not the date on which a run or a cache began.
    if theirs == prompt_ids(teacher.tokenizer, talk, Rendering(arguments)):
        return [passed("the server's gives the same tokens for messages")]
    return [
        warning(
            f"the server's gives other tokens for messages than the one at {teacher.path}, which is used",
            "find out which of the two the model was trained with; --chat-template sets the server's",
            "messages",
        )
    ]


def _key(served: _Served) -> list[Finding]:
    server = served.teacher.server
    if urlsplit(server.url).scheme == "https" or is_near(server.url) or not server.key:
        return []
    return [warning("the key is sent without encryption", "use a server URL with https")]


def _probes(teacher: ServedTeacher, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Short completions of a run's prompts if they have some; else its prompts or sample texts, cut in two."""
    chosen = prompts[:: max(1, len(prompts) // _PROBES)][:_PROBES]
    own = [replace(p, completion=p.completion[:_PROBE_CHARACTERS]) for p in chosen if p.completion]
    texts = [prompt_text(p)[: 2 * _PROBE_CHARACTERS] for p in chosen]
    cut = [
        Prompt(f"probe {n}", text=text[: len(text) // 2], completion=text[len(text) // 2 :])
        for n, text in enumerate(chain(texts, SAMPLE[JUDGED]))
        if text[: len(text) // 2].strip()
    ]
    if found := [p for p in (*own, *cut) if teacher.vocabulary.encode(p.completion or "").ids.size]:
        return found[:_PROBES]
    raise TeacherError(f"tokenizer {teacher.path}: has no token for any text that was tried")


def _total_logp(student: LanguageModel, prompt: Prompt) -> float:
    """The student's log-probability (nats) of a prompt's completion and its end; 0 if it exceeds the context."""
    try:
        return float(_text_logp(student, prompt).sum())
    except DataError:
        return 0.0


@torch.no_grad()
def _text_logp(student: LanguageModel, prompt: Prompt) -> torch.Tensor:
    """The student's log-probabilities of a prompt's completion, token by token, and of its stop id, in nats.

    Raises:
        DataError: it exceeds the student's context.
    """
    rollout = completed(student, prompt, 10**6)
    was_training = student.lm.training
    student.lm.eval()
    logits = lazy_logits(student.lm, student_states(student, [rollout]))
    student.lm.train(was_training)
    target = torch.from_numpy(rollout.ids).long().to(student.device)
    return token_logp(logits, target, target[-1:])[0].double().cpu()


SERVER_CHECKS: tuple[Check[_Served], ...] = (
    Check("key", "Is the API key sent in encrypted form?", _key),
    Check("server", "Does the server give top_k log-probabilities a position?", _top_k),
    Check("tokenization", "Does the server split texts as the tokenizer here does?", _tokenization),
    Check("template", "Does the server's chat template give the same tokens?", _template),
)
STUDENT_CHECKS: tuple[Check[_Served], ...] = (
    Check("noise", "How much do answers to the same request differ?", _noise),
    Check("self KL, served", "Does a server of the student agree with the student here?", _own),
)
