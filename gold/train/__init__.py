"""Training: the training step, the training loop, and run folders."""
