"""What `gold align` prints, in words: the end of its help."""

FORMATS = """\
The picture
  ┃ between chunks: tokens of both sides end here     ¦ between the tokens of a chunk
  · ⏎ ⇥ white space   \\x1b a byte or character that has no glyph   ◌ before a combining mark
  ⟨…⟩ a special token   ∅ a token without bytes of the text   ~ a token whose bytes are not the text's   ⋯ continues

The JSON, one object per text
  {"bytes": n, "student": {"ids": […], "ends": […], "repaired_bytes": n}, "teacher": {…},
   "chunks": [[s0, s1, t0, t1], …], "repaired_bytes": n, "coverage": {…}}
  Student tokens s0 up to s1 (exclusive) and teacher tokens t0 up to t1 decode to the same bytes. "ends" are the byte
  offsets of the text at which the tokens end: a chunk ends at ends[s1 - 1] of the student, ends[t1 - 1] of the teacher.
  A side has "bos_id" and "stop_ids" for special tokens around the text, "prompt_ids" with --chat, and with --score
  "logp" and "entropy" (nats; null for a token that has none) and "stop_logp"; the text has "score" then.
"""
