"""A teacher without a model in this process: only its tokenizer files are available."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gold.losses import Need
from gold.teachers.protocol import Teacher
from gold.tokenize.templates import PromptTokenizer, Rendering
from gold.tokenize.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gold.tokenize.roles import Roles


class AbsentTeacher(Teacher):
    """The tokenizer of a teacher that cannot be queried: its scores are in a cache.

    ``path`` is a folder or a Hub id with tokenizer files; ``rows`` of the model's output matrix and its ``context`` in
    tokens, where known; ``template_kwargs`` as for ``load_model``. Its logits are created on ``device``.

    Raises:
        VocabularyError: the tokenizer does not exist, or its tokens have no bytes.
    """

    gives: Need = "nothing"
    complete = False
    rendering: Rendering

    def __init__(
        self,
        path: str | Path,
        *,
        roles: Roles | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        rows: int | None = None,
        context: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.context = str(path), context
        self.device = torch.device(device)
        self.vocabulary = Vocabulary.load(path, roles=roles).with_markers(rows)
        self.tokenizer = PromptTokenizer.of(self.vocabulary)
        self.rendering = Rendering(dict(template_kwargs or {}))
