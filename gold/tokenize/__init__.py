"""Tokenizers: bytes of every id, encoding and decoding with byte offsets, special tokens, chat templates."""
