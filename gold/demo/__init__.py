"""The built-in demonstration: two tiny models with different tokenizers, one task, everything offline."""
