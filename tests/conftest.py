"""One thread for each process: the models of tests are tiny, and threads that wait for one another cost more.

Families are registered as the command line and the Python API do it, for tests that ask the plans alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from streamconv import families

families.register()
