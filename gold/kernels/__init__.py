"""Arithmetic on rows of logits, with arrays and tensors only: probability sums over token sets, divergences, chunk
sums.

The device selects the back end; ``use_backend`` forces one.
"""

from gold.kernels.backends import BACKENDS as BACKENDS
from gold.kernels.backends import backend_for as backend_for
from gold.kernels.backends import byte_masses as byte_masses
from gold.kernels.backends import chunk_sums as chunk_sums
from gold.kernels.backends import hybrid_distance as hybrid_distance
from gold.kernels.backends import piece_masses as piece_masses
from gold.kernels.backends import row_divergence as row_divergence
from gold.kernels.backends import row_statistics as row_statistics
from gold.kernels.backends import segment_logsumexp as segment_logsumexp
from gold.kernels.backends import sorted_l1 as sorted_l1
from gold.kernels.backends import use_backend as use_backend
from gold.kernels.backends import why_not as why_not
