"""Causal language models from transformers, and what their files tell before they are loaded."""
