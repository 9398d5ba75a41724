"""Adapters: what was trained beside a model's weights, merged into them, kept apart, or written in another form."""
