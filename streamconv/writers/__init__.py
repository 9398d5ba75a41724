"""Writers: specs in, a file's layout out. One module per format, each with `check` and `layout`; see `formats`."""
