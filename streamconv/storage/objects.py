"""Object stores, to read from: `s3://`, `gs://` and `az://`, by obstore.

A directory is what keys have in common before a `/`. A listing says sizes and ETags, so that what is in a directory
that was listed is known without a request for each. An ETag goes with each request for bytes: another object under
the same name is an error, and never read.

Credentials come from where the programs of each provider look for them: the environment, their files in the home
directory, the service of the machine. They stay in the client. What an error of the client says is shortened to its
first line, without what follows a `?` in a URL, which may be a signature.
"""

from __future__ import annotations

import configparser
import errno
import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from streamconv.errors import UsageError
from streamconv.storage.distant import SEEN, DistantFile, Pages, PassingError, pause, waits
from streamconv.storage.roles import Entry, OpenSource, Source, State

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_DIRECTORY = State("directory", 0, "")

# Answers that another try does not change: all of 4xx, but for "too slow" and "too many".
_FINAL = re.compile(r"the server answers 4(?!08|29)\d\d")
_STATUS = re.compile(r"status code: (\d{3}[\w ]*)")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_SIGNED = re.compile(r"\?[^\s>]*")
_LONGEST_TEXT = 400

_RETRIES: dict[str, Any] = {
    "max_retries": 5,
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
    "retry_timeout": timedelta(minutes=3),
}
# A body is waited for as long as bytes come.
_TIMES = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1h"}

_Result = TypeVar("_Result")


def named(place: str) -> str:
    """A place that names a bucket. Raises UsageError for another."""
    kind, _, rest = place.partition("://")
    if not rest.partition("/")[0]:
        raise UsageError("it names no bucket", file=place, hint=f"write {kind}://BUCKET/PREFIX")
    return place


class ObjectSource(Source):
    """See `Source`. What it has listed, it knows for as long as it lives: a fresh one asks again."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, State]] = {}
        self._pages = Pages()

    def state(self, place: str) -> State | None:
        place = place.rstrip("/")
        if place.endswith(":"):
            return None  # above a bucket
        above, _, name = place.rpartition("/")
        if above in self._listed:
            return self._listed[above].get(name)
        if place not in SEEN and self._list(place):
            return _DIRECTORY
        store, key = _store(place)
        if not key:
            return None
        try:
            SEEN[place] = _state(_asked(place, lambda: _obstore().head(store, key)))
        except FileNotFoundError:
            return None
        return SEEN[place]

    def entries(self, place: str) -> Sequence[Entry]:
        found = self._list(place.rstrip("/"))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "there is nothing with that prefix", place)
        return [Entry(name, state.kind, state=state) for name, state in sorted(found.items())]

    def open(self, place: str) -> OpenSource:
        state = SEEN.get(place) or self.state(place)
        if state is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", place)
        if state.kind != "file":
            raise OSError(errno.EISDIR, "it is not an object, but a prefix", place)
        return self.reopen(place, state)

    def reopen(self, place: str, state: State) -> OpenSource:
        return _Object(place, state, self._pages)

    def _list(self, place: str) -> dict[str, State]:
        """What is in a directory by name; nothing where there is none."""
        if place not in self._listed:
            store, key = _store(place)
            found = _asked(
                place, lambda: _obstore().list_with_delimiter(store, prefix=f"{key}/" if key else None)
            )
            names = {_name(place, prefix): _DIRECTORY for prefix in found["common_prefixes"]}
            names |= {_name(place, each["path"]): _state(each) for each in found["objects"]}
            # Some programs mark a directory by an object of no bytes under its own name.
            names.pop(place.rpartition("/")[2] if names.get("") else "", None)
            self._listed[place] = names
            SEEN.update((f"{place}/{name}", state) for name, state in names.items() if state.kind == "file")
        return self._listed[place]


class _Object(DistantFile):
    """An object as it was when it was listed."""

    def __init__(self, place: str, state: State, pages: Pages) -> None:
        super().__init__(place, state.size, pages)
        self._store, self._key = _store(place)
        self._identity = str(state.identity)

    def fetch(self, buffer: memoryview, offset: int) -> None:
        options: dict[str, Any] = {"range": (offset, offset + len(buffer))}
        tagged = self._identity.startswith('"')
        if tagged:
            options["if_match"] = self._identity

        def get() -> None:
            found = _obstore().get(self._store, self._key, options=options)
            if not tagged and _state(found.meta).identity != self._identity:
                raise _changed(self.place)
            data = memoryview(found.bytes())
            if tuple(found.range) != options["range"] or len(data) != len(buffer):
                raise PassingError(
                    errno.EIO, f"{len(data)} bytes came, and {len(buffer)} were asked for", self.place
                )
            buffer[:] = data

        _asked(self.place, get)


@cache
def _obstore() -> Any:
    """The library, where it is there.

    Raises:
        UsageError: it is not.
    """
    try:
        import obstore
    except ImportError as error:
        raise UsageError(
            "object stores are read by obstore, which is not installed",
            hint="pip install 'streamconv[remote]'",
        ) from error
    return obstore


def _store(place: str) -> tuple[ObjectStore, str]:
    """The client of a bucket, and the key in it."""
    kind, _, rest = place.partition("://")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise OSError(errno.EINVAL, f"{kind}://BUCKET/... is how an object is named", place)
    return _client(kind, bucket), key


@cache
def _client(kind: str, bucket: str) -> ObjectStore:
    _obstore()
    from obstore.store import AzureStore, GCSStore, S3Store

    client: Any = dict(_TIMES)
    given: dict[str, Any] = {"client_options": client, "retry_config": _RETRIES}
    try:
        if kind == "gs":
            return GCSStore(bucket, **given)
        if kind == "az":
            return AzureStore(bucket, **given)
        given |= _aws_files()
        said = _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint = said or given.get("endpoint", "")
        # Whoever names an address without encryption wants none there; nowhere else is it allowed.
        client["allow_http"] = endpoint.startswith("http://")
        given |= {"endpoint": endpoint} if endpoint else {}
        return S3Store(bucket, **given)
    except Exception as error:
        raise OSError(
            errno.EINVAL, f"the store cannot be used: {_text(error)}", f"{kind}://{bucket}"
        ) from error


def _first(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _aws_files() -> dict[str, str]:
    """What the files of Amazon's programs say for the profile that is in use, where the environment says nothing."""
    home = Path("~/.aws").expanduser()
    profile = _first("AWS_PROFILE") or "default"
    keys = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", home / "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", home / "credentials", profile),
    ):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read(_first(variable) or file, encoding="utf-8")
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue  # as if it were not there: the service says what is missing, and an error could quote a secret
        if parser.has_section(section):
            found |= {keys[key]: value for key, value in parser.items(section) if key in keys and value}
    secrets = ("access_key_id", "secret_access_key", "session_token")
    if _first("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        found = {key: value for key, value in found.items() if key not in secrets}
    if _first("AWS_REGION", "AWS_DEFAULT_REGION"):
        found.pop("region", None)
    return found


def _state(found: Any) -> State:
    tag = found["e_tag"] or found["last_modified"].isoformat()
    return State("file", found["size"], tag)


def _name(place: str, key: str) -> str:
    """The name in its directory of what a listing gave.

    Raises:
        OSError: it is none that a path can have.
    """
    name = key.rstrip("/").rpartition("/")[2]
    if name in (".", "..") or "\\" in name or "\0" in name:
        raise OSError(errno.EINVAL, f"it lists an object that no path can name: {name[:80]!r}", place)
    return name


def _asked(place: str, call: Callable[[], _Result]) -> _Result:
    """What a call to the library gives, tried again where that may help; its failures as OSErrors."""
    for wait in (*waits(), None):
        try:
            return call()
        except (UsageError, KeyboardInterrupt):
            raise
        except Exception as error:
            fault = _fault(place, error)
            if wait is None or not isinstance(fault, PassingError):
                raise fault from None
            pause(wait)
    raise AssertionError


def _fault(place: str, error: Exception) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", place)
    if isinstance(error, OSError):
        return error
    kind, text = type(error).__name__, _text(error)
    if kind == "PreconditionError":
        return _changed(place)
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return PermissionError(errno.EACCES, f"the store refuses access: {text}", place)
    if kind in ("InvalidPathError", "NotSupportedError", "UnknownConfigurationKeyError") or _FINAL.search(
        text
    ):
        return OSError(errno.EINVAL, text, place)
    return PassingError(errno.EIO, text, place)


def _changed(place: str) -> OSError:
    return OSError(errno.ESTALE, "it is another object by now: its ETag changed", place)


def _text(error: Exception) -> str:
    """What an error of the library says, in one line that quotes no part of a URL that may be secret."""
    whole = str(error)
    status, code = _STATUS.search(whole), _CODE.search(whole)
    if status:
        return f"the server answers {status[1].strip()}" + (f" ({code[1]})" if code else "")
    text = _SIGNED.sub("", whole.partition("\n")[0]).strip()
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."
