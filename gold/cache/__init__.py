"""What a teacher said of texts, kept in a folder: numpy and bytes alone."""
