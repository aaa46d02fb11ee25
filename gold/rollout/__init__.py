"""Rollouts: what the student writes."""
