"""One thread for each process: the models of tests are tiny, and threads that wait for one another cost more.

Families are registered as the command line and the Python API do it, for tests that ask the plans alone. How long an
example of Hypothesis takes says how busy a machine is, and fails no test.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from hypothesis import settings
from remote import Store, environment, s3

from streamconv import families
from streamconv.storage import distant, objects

families.register()
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Store]:
    """An S3 server on loopback."""
    with s3() as server:
        yield server


@pytest.fixture
def store(s3_server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The server with nothing injected, and this process's clients made for it."""
    for name, value in environment(s3_server.proxy.address).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distant, "FIRST_WAIT", 0.01)
    objects._client.cache_clear()
    distant.SEEN.clear()
    s3_server.proxy.reset()
    yield s3_server
    s3_server.proxy.reset()
    objects._client.cache_clear()
