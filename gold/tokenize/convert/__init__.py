"""Tokenizers from files that the tokenizers library does not read itself."""
