"""Causal language models from transformers, and checks of their files before loading."""
