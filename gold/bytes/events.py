"""Event numbers: columns of a table of next bytes, and the events after the pieces in a table of pieces."""

STOP_EVENT = 256
"""Column of the stop event in a table of byte events; columns 0..255 are the bytes."""
UNRESOLVED_EVENT = 257
"""Column of all mass that determines no next byte: a token that could end here, a special token, a padding row."""
EVENTS = 258
"""Number of columns of a table of byte events."""

STOP, OBSERVED, RESIDUAL, UNRESOLVED = range(4)
"""Events after the pieces, as offsets from the number of pieces: the stop event, the sampled token, text that begins
with no piece, and last all other mass."""
EXTRA_EVENTS = 4
"""Number of events after the pieces."""
BY_PIECE, MOVED, PATH = -1, -2, -3
"""Other kinds of a range of tokens, besides event numbers: see ``pieces.PieceRanges``."""
