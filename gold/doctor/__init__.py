"""Checks of a student-teacher pair before training: tokenizers, prompts, weights, servers; findings with advice."""
