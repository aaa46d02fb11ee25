"""The checks of a teacher that is served: what its server reads, how much it gives, and whether it says it twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from urllib.parse import urlsplit

import torch

from gold.align.collate import student_states
from gold.data import Prompt
from gold.doctor.checks import Check
from gold.doctor.sample import JUDGED, SAMPLE
from gold.doctor.weights import divergence
from gold.errors import DataError, TeacherError
from gold.kernels.lm_head import token_logp
from gold.models.causal import LanguageModel, rows_of
from gold.rollout.engine import completed
from gold.teachers.dialects import Known, OpenAI
from gold.teachers.http import RefusedError, is_near
from gold.teachers.served import ServedTeacher
from gold.tokenize.chat import has_chat_template, prompt_ids, prompt_text
from gold.tokenize.templates import Rendering

MOST_NOISE = 0.01
"""Warn above, in nats per byte: how far answers to the same request are apart. Near its end a run has some hundredths
of reverse KL left to learn from; answers in 16 bits, batched as they come, stay well below."""
MOST_OWN_KL = 5e-3
"""Fail above, in nats per byte: a student from itself as it is served. A server in bfloat16 was 0.001 from the same
weights in float32; other weights, templates or places are above 0.05."""
MOST_NOISE_SHARE = 0.1
"""Warn above: the same as a share of the distance between student and teacher; at 1 and beyond nothing is learned."""
_TIMES = 3
_PROBES = 4
_PROBE_CHARACTERS = 256


def examine_server(teacher: ServedTeacher, prompts: Sequence[Prompt] = ()) -> list[Check]:
    """Whether the server answers what it is asked, gives as much as is wanted, and reads texts and messages as the
    tokenizer files do.

    Raises:
        TeacherError: it does not answer.
    """
    teacher.learn_context()
    probe = _probes(teacher, prompts)[0]
    ids = teacher.vocabulary.encode(probe.completion or "").ids
    try:
        (positions,) = teacher.known([teacher.asked(probe, ids.tolist(), True)])
    except RefusedError as error:
        advice = teacher.dialect.advice if "logprobs" in str(error) else "see docs/served-teacher.md"
        return [Check("server", "fail", str(error), advice)]
    given = _given(teacher, positions)
    return [*_key(teacher), given, _tokenization(teacher, prompts), *_template(teacher, prompts)]


def examine_noise(
    teacher: ServedTeacher, prompts: Sequence[Prompt] = (), student: LanguageModel | None = None
) -> Check:
    """How far the server's answers to the same request are apart, in nats per byte, beside the distance between
    ``student`` and teacher on the same texts where there is one.

    Raises:
        TeacherError: the server does not answer.
    """
    probes = _probes(teacher, prompts)
    spelled = [teacher.vocabulary.encode(p.completion or "") for p in probes]
    asked = [teacher.asked(p, s.ids.tolist(), True) for p, s in zip(probes, spelled, strict=True)]
    answers = teacher.known([each for each in asked for _ in range(_TIMES)])
    # The token that was sent comes first.
    logp = [[next(iter(known.values())) for known in answer] for answer in answers]
    same = [logp[n : n + _TIMES] for n in range(0, len(logp), _TIMES)]
    size = max(1, sum(len(s.data) for s in spelled))
    # Of a token that has probability 0 each time, answers do not differ.
    noise = sum(max(v) - min(v) for each in same for v in zip(*each, strict=True) if min(v) < max(v)) / size
    found = f"{_TIMES} answers to the same request are {noise:.2g} nats per byte apart"
    if teacher.forgets:
        found += "; it tells zeros of what is in its prefix cache, past which it is asked from now on"
        return Check("noise", "warn", found, f"start it with {teacher.dialect.uncached}")
    loud = noise > MOST_NOISE
    if student is not None:
        theirs = [_total_logp(student, probe) for probe in probes]
        signal = sum(abs(sum(each[0]) - p) for each, p in zip(same, theirs, strict=True)) / size
        found += f"; student and teacher are {signal:.2g} apart"
        loud = loud or noise > MOST_NOISE_SHARE * max(signal, MOST_NOISE)
        if noise > max(signal, MOST_NOISE):
            return Check("noise", "fail", found, _STEADY)
    return Check("noise", "warn", found, _STEADY) if loud else Check("noise", "pass", found)


def examine_own(teacher: ServedTeacher, prompts: Sequence[Prompt], student: LanguageModel) -> Check:
    """Whether a server that serves the student says what the student says itself.

    Taken two ways, in nats per byte, and the larger counts: the reverse KL, token by token, on the tokens that the
    server names and all others together; and half the squared difference of the log-probabilities of the texts' own
    tokens, which is that KL to second order, and sees servers that name no others.

    Raises:
        TeacherError: the server does not answer.
    """
    name = "zero KL, served"
    probes = _probes(teacher, prompts)
    try:
        value = divergence(student, teacher, probes, "shared")
        mine = [_text_logp(student, probe) for probe in probes]
    except DataError as error:
        return Check(name, "warn", f"not tried: {error}", "shorten the longest prompts")
    spelled = [teacher.vocabulary.encode(p.completion or "") for p in probes]
    asked = [teacher.asked(p, s.ids.tolist(), False) for p, s in zip(probes, spelled, strict=True)]
    squares = 0.0
    for own, positions in zip(mine, teacher.known(asked), strict=True):
        theirs = torch.tensor([next(iter(known.values())) for known in positions], dtype=torch.float64)
        squares += float((own[:-1] - theirs).square().sum()) if len(own) == len(theirs) + 1 else math.inf
    value = max(value, squares / 2 / max(1, sum(len(s.data) for s in spelled)))
    found = f"the student from itself as it is served: {value:.1g} nats per byte"
    if value <= MOST_OWN_KL:
        return Check(name, "pass", found)
    advice = (
        f"it must be below {MOST_OWN_KL:g}: serve the weights of {teacher.path}, not quantised and in one dtype; "
        "if another model is served, name its own folder in teacher.path"
    )
    return Check(name, "fail", found, advice)


_WHOLE = (
    "let it not cut off what is unlikely: vLLM does with --logprobs-mode processed_logprobs and a top_p or top_k; from "
    "texts of probability 0 nothing is learned"
)
_STEADY = "let one replica answer, in one dtype, with kernels that do not depend on the batch"


def _given(teacher: ServedTeacher, positions: Sequence[Known]) -> Check:
    most = max(map(len, positions))
    lost = sum(next(iter(known.values())) == -math.inf for known in positions)
    enough = most >= min(teacher.top_k, teacher.vocabulary.size)
    if lost:
        found = f"gives probability 0 to {lost} of the {len(positions)} tokens of a plain text"
        few = f", and more to {most} tokens of a row at most, where top_k is {teacher.top_k}"
        return Check("server", "warn" if enough else "fail", found + ("" if enough else few), _WHOLE)
    if enough:
        stops = ", and all stop ids" if getattr(teacher.dialect, "chosen", False) else ""
        return Check("server", "pass", f"gives {teacher.gives} of each row{stops}")
    found = f"gives {most} tokens of a row where top_k is {teacher.top_k}"
    # Strings that stand for several tokens are left out.
    return Check("server", "warn" if teacher.api == "openai" else "fail", found, teacher.dialect.advice)


def _tokenization(teacher: ServedTeacher, prompts: Sequence[Prompt]) -> Check:
    texts = [p.completion or "" for p in _probes(teacher, prompts)]
    texts += [text for kind in SAMPLE.values() for text in kind[:2]]
    # What a tokenizer reads nothing of, a server may refuse.
    texts = [text for text in texts if teacher.vocabulary.encode(text).ids.size]
    try:
        theirs = teacher.server.ask([teacher.dialect.tokenize(teacher.served_model, text) for text in texts])
    except RefusedError as error:
        return Check(
            "tokenization", "warn", f"not compared: {error}", "make sure that the tokenizers are the same"
        )
    for text, found in zip(texts, theirs, strict=True):
        ids = teacher.vocabulary.encode(text).ids.tolist()
        if not _same(teacher, ids, found):
            shown = [found[:8], ids[:8]]
            return Check(
                "tokenization",
                "fail",
                f"the server reads {text[:40]!r} as {shown[0]}…, the tokenizer at {teacher.path} as {shown[1]}…",
                "give teacher.path the tokenizer of the model that is served",
            )
    return Check(
        "tokenization", "pass", f"{len(texts)} texts read as the tokenizer at {teacher.path} reads them"
    )


def _same(teacher: ServedTeacher, ids: list[int], found: list[int] | list[str]) -> bool:
    if not isinstance(teacher.dialect, OpenAI):
        return ids == found
    reads = teacher.dialect.reads_as
    return len(ids) == len(found) and all(reads(str(shown), i) for shown, i in zip(found, ids, strict=True))


def _template(teacher: ServedTeacher, prompts: Sequence[Prompt]) -> list[Check]:
    talks = [p for p in prompts if p.messages is not None]
    if not talks or not has_chat_template(teacher.tokenizer):
        return []
    messages = talks[0].messages or ()
    arguments = teacher.rendering.arguments
    if (call := teacher.dialect.template(teacher.served_model, messages, arguments)) is None:
        return []
    try:
        (theirs,) = teacher.server.ask([call])
    except RefusedError as error:
        return [
            Check(
                "template",
                "warn",
                f"not compared: {error}",
                "look at the server's chat template",
                ("messages",),
            )
        ]
    # The server writes today's date, whatever day a run or a cache began on.
    if theirs == prompt_ids(teacher.tokenizer, talks[0], Rendering(arguments)):
        return [Check("template", "pass", "the server's makes the same of messages")]
    return [
        Check(
            "template",
            "warn",
            f"the server's makes other tokens of messages than the one at {teacher.path}, which is used",
            "look which of the two the model was trained with; --chat-template sets the server's",
            ("messages",),
        )
    ]


def _key(teacher: ServedTeacher) -> list[Check]:
    url = teacher.server.url
    if urlsplit(url).scheme == "https" or is_near(url) or not teacher.server.key:
        return []
    return [Check("key", "warn", "the key is sent without encryption", "give the server's URL with https")]


def _probes(teacher: ServedTeacher, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Short completions behind their prompts, the run's own where there are some; else texts cut in two."""

    def usable(prompt: Prompt) -> bool:
        return bool(teacher.vocabulary.encode(prompt.completion or "").ids.size)

    chosen = prompts[:: max(1, len(prompts) // _PROBES)][:_PROBES]
    own = [replace(p, completion=p.completion[:_PROBE_CHARACTERS]) for p in chosen if p.completion]
    texts = [prompt_text(p)[: 2 * _PROBE_CHARACTERS] for p in chosen]
    cut = [
        Prompt(f"probe {n}", text=text[: len(text) // 2], completion=text[len(text) // 2 :])
        for n, text in enumerate(chain(texts, SAMPLE[JUDGED]))
        if text[: len(text) // 2].strip()
    ]
    if found := [p for p in (*own, *cut) if usable(p)][:_PROBES]:
        return found
    raise TeacherError(f"tokenizer {teacher.path}: reads no token in any text that was tried")


def _total_logp(student: LanguageModel, prompt: Prompt) -> float:
    """The student's log-probability of a prompt's completion and its end, in nats."""
    try:
        return float(_text_logp(student, prompt).sum())
    except DataError:  # too long for it: as if it knew nothing
        return 0.0


@torch.no_grad()
def _text_logp(student: LanguageModel, prompt: Prompt) -> torch.Tensor:
    """The student's log-probabilities of a prompt's completion, token by token, and of its stop id, in nats.

    Raises:
        DataError: it is too long for it.
    """
    rollout = completed(student, prompt, 10**6)
    was_training = student.lm.training
    student.lm.eval()
    rows = rows_of(student.lm, student_states(student, [rollout]))
    student.lm.train(was_training)
    target = torch.from_numpy(rollout.ids).long().to(student.device)
    return token_logp(rows, target, target[-1:])[0].double().cpu()
