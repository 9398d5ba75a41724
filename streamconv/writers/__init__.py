"""Writers: specs in, a file's layout out. One module a format, each with `check` and `layout`; see `formats`."""
