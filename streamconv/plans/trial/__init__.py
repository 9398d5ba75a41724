"""A trial: a few layers of a checkpoint, which convert in seconds and load as the whole does."""
