"""What people look at: alignments in a terminal and as a page, scores, and plots of a run."""
