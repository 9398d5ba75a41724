"""Options: one record says what they are, and all else is derived from it.

`records` has every option, as the field of a record. The parsers of the command line, the keywords of
`streamconv.open`, `plan`, `convert` and `verify` (and their types), the arguments that a conversion records and what
readers are given come from there, by `fields`. `effect` refuses options that have none; `option` is what a field says,
and `spelling` how messages write it. A package outside adds a row to `fields.ADDED`.

Nothing here is heavy to import: `--help` needs it.
"""
