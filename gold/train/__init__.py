"""Training: one step, the run around it, and what a run folder holds."""
