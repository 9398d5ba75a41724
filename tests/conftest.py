"""One thread for each process: the models of tests are tiny, and threads that wait for one another cost more.

Families are registered as the command line and the Python API do it, for tests that ask the plans alone. How long an
example of Hypothesis takes says how busy a machine is, and fails no test.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from streamconv import families

families.register()
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
