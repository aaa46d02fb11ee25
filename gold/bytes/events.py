"""Numbers of the events of a table of next bytes, and of those beyond the pieces of a table of pieces."""

STOP_EVENT = 256
"""Column of the stop event in a table of byte events; columns 0..255 are the bytes."""
UNRESOLVED_EVENT = 257
"""Column of all that names no next byte: a token that could end here, a special token, a padding row."""
EVENTS = 258
"""Number of columns of a table of byte events."""

STOP, OBSERVED, RESIDUAL, UNRESOLVED = range(4)
"""Events after the pieces, counted from their number: the stop event, the sampled token, text that begins with no
piece, and all else, last."""
EXTRA_EVENTS = 4
"""How many these are."""
BY_PIECE, MOVED, PATH = -1, -2, -3
"""What else a range of tokens can be, besides the number of an event: see ``pieces.PieceRanges``."""
