"""Ids and bytes: the vocabulary of a tokenizer, where its tokens end in a text, its special tokens and templates."""
