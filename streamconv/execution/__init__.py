"""One work item: evaluate its blocks, write or compare them, in bounded memory."""
