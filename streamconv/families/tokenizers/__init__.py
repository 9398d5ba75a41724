"""Tokenizers as files: from what a model comes with to a `tokenizer.json` that needs no code of the model."""
