"""What can be told of a pair before it is trained: checks, each with what was found and what to do."""
