"""Byte alignment of two tokenizations of one text: chunks, vocabulary overlap, batches."""
