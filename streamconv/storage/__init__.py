"""Where bytes come from and go to.

roles      what a storage must be able to do: `Source`, `Sink`
local      the local disk, in both roles
resolve    which storage a place belongs to
location   a place to look at and read from, with `pathlib`'s grammar
files      the open files of a worker
"""
