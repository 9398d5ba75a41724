"""A whole run: the destination, the journal, what is done and left, finishing, verification, comparison."""
