"""Views for people: alignments in a terminal and as an HTML page, scores, and plots of a run."""
