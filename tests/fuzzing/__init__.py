"""Mutants of every file that the program reads, made by the formats' own grammars; see `python -m tests.fuzzing --help`.

`seeds` makes what is valid, with the libraries that own the formats. `grammars` changes it field by field and puts lengths,
offsets and checksums right again, so that a mutant gets past the first check. `targets` says what is done with a mutant
and must hold. `loop` runs them within limits, and keeps those that reach new lines to be changed further.
"""
