"""The process behind `engines.processes`: settings and storages, then batches, come in as pickles; receipts go out.

Run as `python -m streamconv.engines.worker`. It ends when its input does, so it never outlives its parent
by more than the batch in hand, whose bytes are the same whoever writes them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

from streamconv.errors import StreamconvError
from streamconv.execution.execute import Worker
from streamconv.storage.resolve import STORAGES


def main() -> None:
    """Serve until the input ends."""
    # Whatever prints by accident must not end up among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    with contextlib.suppress(OSError):  # there may be none
        os.dup2(2, 1)
    requests = sys.stdin.buffer
    try:
        settings, storages = pickle.load(requests)  # noqa: S301 - from the parent process, over its pipe
        STORAGES.update((name, pickle.loads(data)) for name, data in storages.items())  # noqa: S301 - as above
        worker: Worker | None = None
        while True:
            batch = pickle.load(requests)  # noqa: S301 - as above
            try:
                worker = worker or Worker(settings)
                reply: object = worker.run(batch)
            except StreamconvError as error:
                reply = error
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # the parent is gone or done; nothing is left to flush


if __name__ == "__main__":
    main()
