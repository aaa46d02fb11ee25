"""Two vocabularies and everything derived from them only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from gold.align.decomposition import TokenWeights, likeliest_pairs, token_weights
from gold.align.overlap import byte_equal_pairs
from gold.tokenize.markers import retokenize, shared_markers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gold.bytes.pieces import Pieces
    from gold.bytes.trie import ByteTrie
    from gold.kernels.layout import KernelTrie
    from gold.kernels.projection import PieceColumns
    from gold.tokenize.vocabulary import TokenizedText, Vocabulary


@dataclass(frozen=True)
class VocabularyPair:
    """The student's and the teacher's vocabulary: tries, byte-equal tokens, whether they are the same."""

    student: Vocabulary
    teacher: Vocabulary

    @cached_property
    def same(self) -> bool:
        """Whether the teacher can score the student's own ids, see ``Vocabulary.same_as``."""
        return self.student.same_as(self.teacher)

    @cached_property
    def student_trie(self) -> ByteTrie:
        """The student's byte trie."""
        return _trie(self.student)

    @cached_property
    def teacher_trie(self) -> ByteTrie:
        """The teacher's byte trie."""
        return self.student_trie if self.same else _trie(self.teacher)

    @cached_property
    def shared_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pairs of byte-equal text tokens, as two arrays of ids."""
        return byte_equal_pairs(self.student, self.teacher)

    @cached_property
    def pieces(self) -> Pieces:
        """The byte strings to which tokens of both vocabularies can be truncated."""
        from gold.bytes.pieces import Pieces

        return Pieces.of(self.student, self.teacher)

    @cached_property
    def kernel_tries(self) -> tuple[KernelTrie, KernelTrie]:
        """The byte tries of the student and of the teacher for the kernels."""
        from gold.kernels.layout import KernelTrie  # torch

        mine = KernelTrie(self.student_trie)
        return mine, mine if self.same else KernelTrie(self.teacher_trie)

    @cached_property
    def piece_columns(self) -> tuple[PieceColumns, PieceColumns]:
        """The pieces of the columns of the student's rows and of the teacher's."""
        from gold.kernels.projection import PieceColumns  # torch

        (mine, theirs), pieces = self.kernel_tries, self.pieces
        count = pieces.ids.size
        return (
            PieceColumns(mine, pieces.at_S, self.student.offsets, count),
            PieceColumns(theirs, pieces.at_T, self.teacher.offsets, count),
        )

    @cached_property
    def token_weights(self) -> TokenWeights:
        """The sparse matrix of ``x_token`` from student tokens to teacher tokens."""
        return token_weights(self.student, self.teacher)

    @cached_property
    def relaxed_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pairs of tokens with a weight of at least 0.6 in ``token_weights``, as two arrays of ids."""
        return likeliest_pairs(self.token_weights, self.student)

    @cached_property
    def markers(self) -> dict[int, int]:
        """The teacher's id of each of the student's markers that the teacher has too."""
        return shared_markers(self.student, self.teacher)

    def to_teacher(self, tokenized: TokenizedText, *, at_start: bool = True) -> TokenizedText:
        """A text tokenized by the student, retokenized by the teacher; the same ids with one vocabulary."""
        return tokenized if self.same else retokenize(self.teacher, tokenized, self.markers, at_start)

    def to_student(self, tokenized: TokenizedText, *, at_start: bool = True) -> TokenizedText:
        """A text tokenized by the teacher, retokenized by the student."""
        back = {theirs: mine for mine, theirs in self.markers.items()}
        return tokenized if self.same else retokenize(self.student, tokenized, back, at_start)


def _trie(vocabulary: Vocabulary) -> ByteTrie:
    from gold.bytes.trie import ByteTrie  # numba: half a second

    return ByteTrie.of(vocabulary)
