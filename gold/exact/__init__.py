"""Next-byte probabilities over all ways to write a text in tokens, not only its own: values, and what is unresolved."""
