"""A teacher with a score cache in a folder: no text is requested twice, and a run can train on the cache alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from gold.cache.codes import Scores, decode, encode
from gold.cache.shard import Origin
from gold.cache.store import ScoreCache, find_origin
from gold.data import Prompt
from gold.errors import ConfigError, DataError, TeacherError
from gold.exact.marginals import States
from gold.kernels.logits import LazyLogits, TopKLogits, likeliest
from gold.models.padding import batches_by_length
from gold.teachers.protocol import Teacher
from gold.tokenize.chat import starts_text
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

TOP_K = 20
"""Default number of tokens kept per row, for a teacher in this process."""
_NEVER_NATS = -9990.0
"""Lower log-probabilities are −∞: older folders contain the −9999 that servers write for it, within a nat."""
_BATCH_TOKENS = 16384
_CHUNK = 4096
_ADVICE = (
    "gold cache build scores the completions of a configuration's data; a completion that rollout.max_new_tokens cuts "
    "short, or that the student writes, is another text"
)


class CachedTeacher(Teacher):
    """A teacher with a cache of its scores in a folder.

    A text in the cache is not requested; any other text is requested once and stored. In both cases the rows are
    decoded from the cache: a run that finds all scores computes the same as the run that requested them. The rows are
    partial, whatever the teacher gives: ``top_k`` tokens each (for a served teacher, the number it requests; otherwise
    that of the cache, or 20 in a new one), the token of the text and the stop ids, and the tail mass. ``revision``
    distinguishes served models of the same name. For an ``AbsentTeacher`` a missing text is an error.

    Raises:
        ConfigError: the cache has another teacher, revision, vocabulary or top_k.
        TeacherError: the cache cannot be read, or does not exist and the teacher is absent.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        *,
        top_k: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.teacher = teacher
        self.cache = _opened(teacher, Path(folder), top_k, revision)
        origin = self.cache.origin
        self.name = f"{teacher.name if teacher.complete else origin.teacher} in cache {self.cache.folder}"
        self.gives = "top_k" if origin.top_k else "tokens"
        self.vocabulary, self.device = teacher.vocabulary, teacher.device
        self.tokenizer, self.rendering, self.model = teacher.tokenizer, teacher.rendering, teacher.model
        self.complete, self.batch_tokens = teacher.complete, teacher.batch_tokens
        self.pinned_date = date.fromisoformat(origin.date) if origin.date else None
        if self.pinned_date:
            self.pin_date(self.pinned_date)
        self.found = self.asked = 0
        self._checks: list[Callable[[], None]] = []
        self._width = max(1, origin.top_k) + 1 + len(self.vocabulary.stop_ids)

    def check_before_asking(self, check: Callable[[], None]) -> None:
        """See ``Teacher.check_before_asking``; with scores in the cache, ``check`` waits for the first request.

        The teacher was checked when they were requested, and may be unavailable now.
        """
        if len(self.cache):
            self._checks.append(check)
        else:
            self.teacher.check_before_asking(check)

    @property
    def context(self) -> int | None:  # type: ignore[override]
        """The teacher's context, which its server may lower."""
        return self.teacher.context

    @property
    def packed(self) -> bool:
        """Whether the teacher's model reads packed texts."""
        return self.teacher.packed

    @packed.setter
    def packed(self, packed: bool) -> None:
        self.teacher.packed = packed

    @property
    def retries(self) -> int | None:
        """The number of requests that a served teacher has repeated so far."""
        return self.teacher.retries

    def adapt_prompt(self, prompt: Prompt) -> Prompt:
        """See ``Teacher.adapt_prompt``."""
        return self.teacher.adapt_prompt(prompt)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See ``Teacher.prompt_ids``."""
        return self.teacher.prompt_ids(prompt)

    def misfit(self, prompt: Prompt, tokens: int) -> str:
        """See ``Teacher.misfit``."""
        return self.teacher.misfit(prompt, tokens)

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``.

        Raises:
            DataError: a prompt that the teacher cannot read.
            TeacherError: the teacher does not answer, or is absent and texts are missing; the disk is full.
        """
        keys = self._keys(prompts, tokenized_texts, stopped)
        kept = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        chosen = [i for i in _firsts(keys) if kept[keys[i]] is None]
        if chosen:
            self.check_kept(prompts, tokenized_texts, stopped)
            asked = self._ask(
                [prompts[i] for i in chosen],
                [tokenized_texts[i] for i in chosen],
                [stopped[i] for i in chosen],
            )
            records = [(keys[i], *each) for i, each in zip(chosen, asked, strict=True)]
            self.cache.add(records)
            kept |= {key: data for key, _, data in records}
        self.asked += len(chosen)
        self.found += len(keys) - len(chosen)
        rows = [len(s.ids) + bool(stop) for s, stop in zip(tokenized_texts, stopped, strict=True)]
        return [self._rows(kept[key] or b"", count) for key, count in zip(keys, rows, strict=True)]

    def states(self, prompt: Prompt, tokenized: TokenizedText, stopped: bool) -> States:
        """See ``Teacher.states``: those of the teacher itself; branches are not stored."""
        return self.teacher.states(prompt, tokenized, stopped)

    def missing(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[int]:
        """Indices of the texts that are not in the cache; of equal ones the first."""
        keys = self._keys(prompts, tokenized_texts, stopped)
        return [i for i in _firsts(keys) if keys[i] not in self.cache]

    def check_kept(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> None:
        """See ``Teacher.check_kept``; the error gives the number of missing texts."""
        if not self.complete and (lacking := self.missing(prompts, tokenized_texts, stopped)):
            raise TeacherError(
                f"cache {self.cache.folder}: lacks {len(lacking):,} of {len(prompts):,} texts, that of prompt "
                f"{prompts[lacking[0]].key} for one, and no teacher can be asked; {_ADVICE}"
            )

    def _keys(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[bytes]:
        key = self.cache.origin.key
        return [
            key(self.prompt_ids(prompt), tokenized.ids.tolist(), bool(stop))
            for prompt, tokenized, stop in zip(prompts, tokenized_texts, stopped, strict=True)
        ]

    def _ask(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[tuple[int, bytes]]:
        """The number of rows of each text, and its encoded scores."""
        try:
            for check in self._checks:
                check()
        except ConfigError as error:  # TeacherError: a run in progress saves a checkpoint
            raise TeacherError(str(error)) from error
        self._checks.clear()
        stops = torch.tensor(self.vocabulary.stop_ids, device=self.device)
        results = []
        answers = self.teacher.score(prompts, tokenized_texts, stopped)
        for prompt, rows, tokenized, stop in zip(prompts, answers, tokenized_texts, stopped, strict=True):
            target = torch.tensor([*tokenized.ids.tolist(), *([-1] * bool(stop))], device=self.device)
            also = torch.cat((target[:, None], stops.expand(len(target), -1)), dim=1).long()
            also = also.masked_fill(also >= rows.width, -1)  # a stop id beyond the model's rows
            parts = likeliest(rows, self.cache.origin.top_k, also, self.vocabulary.size)
            try:
                results.append((len(rows), encode(Scores(*(part.cpu().numpy() for part in parts)))))
            except ValueError as error:
                raise TeacherError(f"prompt {prompt.key}: teacher {self.teacher.name}: {error}") from error
        return results

    def _rows(self, data: bytes, count: int) -> LazyLogits:
        try:
            scores = decode(data)
            if len(scores) != count or scores.ids_NK.shape[1] > self._width:
                raise ValueError(f"{scores.ids_NK.shape} scores, expected {(count, self._width)}")
            if scores.ids_NK.max(initial=-1) >= self.vocabulary.size:
                raise ValueError("a token id beyond the vocabulary")
            ordered = np.sort(scores.ids_NK, axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                raise ValueError("a token twice at one position")
        except ValueError as error:
            raise TeacherError(
                f"cache {self.cache.folder}: the scores of a text are broken ({error}); build the cache again"
            ) from error
        # Rows of several texts are concatenated, so all have the same width.
        gap = ((0, 0), (0, self._width - scores.ids_NK.shape[1]))
        never = scores.logp_NK < _NEVER_NATS
        logp = np.pad(np.where(never, -np.inf, scores.logp_NK), gap)
        never[:, :1] = False  # the token of the text is always kept
        ids = np.pad(np.where(never, -1, scores.ids_NK), gap, constant_values=-1)
        known_ids, known_logp = (torch.from_numpy(a).to(self.device) for a in (ids, logp))
        return TopKLogits(known_ids, known_logp, self.vocabulary.size)


def record(
    teacher: CachedTeacher, prompts: Sequence[Prompt], report: Callable[[int, int], None] = lambda *_: None
) -> list[str]:
    """Requests and stores the completions of prompts, ends included, that are not cached; see ``record_texts``.

    Raises:
        DataError: a prompt without a completion, or that the teacher cannot read.
        TeacherError: see ``CachedTeacher.score``.
    """
    given = (prompt.for_teacher for prompt in prompts)
    return record_texts(teacher, ((prompt, _completion(teacher, prompt), True) for prompt in given), report)


def record_texts(
    teacher: CachedTeacher,
    texts: Iterable[tuple[Prompt, TokenizedText, bool]],
    report: Callable[[int, int], None] = lambda *_: None,
) -> list[str]:
    """Requests and stores the texts that are not cached; a kill loses one batch. A text is a prompt for the teacher,
    the teacher's tokens, and whether its end is scored.

    Returns one line for each text that the teacher cannot read; those are skipped, as in a run. ``report`` is called
    repeatedly with the number of finished texts and the number of requested rows.

    Raises:
        DataError: a prompt that the teacher cannot read.
        TeacherError: see ``CachedTeacher.score``.
    """
    done = rows = 0
    unread: list[str] = []
    given = iter(texts)
    while chunk := list(islice(given, _CHUNK)):
        reasons = [teacher.misfit(prompt, spelled.ids.size) for prompt, spelled, _ in chunk]
        unread += filter(None, reasons)
        done += sum(map(bool, reasons))
        fits = [text for text, reason in zip(chunk, reasons, strict=True) if not reason]
        lacking = [fits[i] for i in teacher.missing(*_columns(fits))]
        done += len(fits) - len(lacking)
        report(done, rows)
        lengths = [len(teacher.prompt_ids(prompt)) + spelled.ids.size for prompt, spelled, _ in lacking]
        for batch in batches_by_length(lengths, _BATCH_TOKENS):
            chosen = [lacking[i] for i in batch]
            teacher.score(*_columns(chosen))
            done += len(chosen)
            rows += sum(spelled.ids.size + stopped for _, spelled, stopped in chosen)
            report(done, rows)
    return unread


def _columns(
    texts: Sequence[tuple[Prompt, TokenizedText, bool]],
) -> tuple[list[Prompt], list[TokenizedText], list[bool]]:
    return [text[0] for text in texts], [text[1] for text in texts], [text[2] for text in texts]


def _completion(teacher: CachedTeacher, prompt: Prompt) -> TokenizedText:
    if prompt.completion is None:
        raise DataError(f"prompt {prompt.key}: it has no completion; give every prompt one")
    return teacher.vocabulary.encode(prompt.completion, at_start=starts_text(prompt))


def _firsts(keys: Sequence[bytes]) -> list[int]:
    """The index of the first occurrence of each key, ascending."""
    return sorted({key: i for i, key in reversed(list(enumerate(keys)))}.values())


def _opened(teacher: Teacher, folder: Path, top_k: int | None, revision: str | None) -> ScoreCache:
    known = find_origin(folder)
    if known is None and not teacher.complete:
        return ScoreCache.open(folder)  # raises the error that names the problem
    if teacher.top_k is not None:
        if top_k not in (None, teacher.top_k):
            raise ConfigError(
                f"cache {folder}: top_k is {top_k}, and the server is asked for {teacher.top_k}; leave the cache's out"
            )
        top_k = teacher.top_k
    if top_k is None:
        top_k = known.top_k if known else TOP_K
    revision = teacher.cache_revision(revision) if teacher.complete or known is None else known.revision
    day = (known.date if known else None) or date.today().isoformat()
    return ScoreCache.open(
        folder, Origin(teacher.name, revision, _fingerprint(teacher.vocabulary), top_k, day)
    )


def _fingerprint(vocabulary: Vocabulary) -> str:
    """The SHA-256 of all tokens as the tokenizer decodes them, and of which ids are stops.

    This is not the vocabulary's own fingerprint: a loaded tokenizer and its file can differ in which tokens are
    special.
    """
    tokens = [vocabulary.label(index) for index in range(vocabulary.size)]
    return sha256(json.dumps([tokens, sorted(vocabulary.stop_ids)]).encode()).hexdigest()
