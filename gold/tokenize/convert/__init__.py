"""Converts tokenizer files that the `tokenizers` library cannot load."""
