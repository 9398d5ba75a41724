"""Imported by every Python that a run under faults starts: its workers."""

import json
import os
import sys

if "streamconv.engines.worker" in sys.orig_argv:
    sys.path.insert(0, os.environ["PYTHONPATH"].split(os.pathsep)[0])
    from tests.faults import injection

    _setting = injection.Setting(**json.loads(os.environ[injection.VARIABLE]))
    _number = 0
    while True:
        try:
            os.close(os.open(f"{_setting.scratch}/worker-{_number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            _number += 1
    injection.install(_setting, f"worker-{_number}")
