"""MindSpore: `.ckpt` files, and what several ranks hold of a model."""
