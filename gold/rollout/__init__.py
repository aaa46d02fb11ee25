"""Rollouts: sampled completions of the student."""
