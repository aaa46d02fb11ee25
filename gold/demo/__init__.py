"""The embedded demonstration: two tiny models whose tokenizers differ, one task, every step offline."""
