"""Alignment of two tokenizations of one text, in bytes: chunks, overlap of vocabularies, batches."""
