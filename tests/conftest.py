"""One thread for each process: the models of tests are tiny, and threads that wait for one another cost more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
