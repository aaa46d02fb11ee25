"""Measurements of gold on real models and tokenizers, and what they need; not part of the installed package."""
