"""Tables of tensors: what each architecture consists of, one module a family."""
