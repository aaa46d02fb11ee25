"""Next-byte distributions: the byte order of a vocabulary, its trie, and the plan of a batch of texts."""
