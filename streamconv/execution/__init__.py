"""One work item: evaluate its blocks, write or check them, in bounded memory."""
