"""Checks of a pair before it is trained: tokenizers, prompts, weights, servers; each finding says what to do."""
