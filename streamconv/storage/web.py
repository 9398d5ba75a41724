"""Web servers, to read from: `http://` and `https://`, and the requests that a hub is asked by.

Of a file, size and validator (its ETag, or when it was modified) are asked for once; each range is asked for under
that validator. A directory is what the server gives a page of links for.

A redirect is followed within limits: from `https` to nothing else, to no other scheme, to no link-local address (where
machines in a cloud find their credentials); and what gives access goes to the server that it is for, and no further.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import re
import ssl
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from html.parser import HTMLParser
from typing import NoReturn, Self
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from streamconv.errors import UsageError
from streamconv.storage.distant import SEEN, DistantFile, Pages, PassingError, pause, waits
from streamconv.storage.roles import Entry, OpenSource, Source, State

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""

_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_LARGEST_PAGE = 16 << 20
_DIRECTORY = State("directory", 0, "")

_Origin = tuple[str, str, int]
"""Scheme, host, port."""

# Connections that wait for another request.
_idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
_lock = threading.Lock()
_KEPT = 32


class DeniedError(PermissionError):
    """A server refuses access; a signed address may just have expired."""


class Answer:
    """The answer to a request, and the address that gave it. Use it in a `with`: a connection is used again after that."""

    def __init__(
        self, url: str, response: http.client.HTTPResponse, connection: http.client.HTTPConnection
    ) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self._response = response
        self._connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What is left of an answer would be taken for the next.
        if self._response.isclosed() and self._connection.sock is not None:
            _put_back(_origin(self.url), self._connection)
        else:
            self._response.close()
            self._connection.close()

    def read_into(self, buffer: memoryview) -> int:
        """Read some of the body; 0 at its end."""
        return self._response.readinto(buffer)

    def read(self, limit: int) -> bytes:
        """All of a body that has at most so many bytes."""
        data = self._response.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"the answer has more than {limit:,} bytes")
        self._response.read()
        return data

    @property
    def validator(self) -> str:
        """What changes when the file does; empty where the server does not say."""
        return self.headers.get("ETag") or self.headers.get("Last-Modified") or ""


def ask(method: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str]) -> Answer:
    """Make a request, and follow where it is sent; `secret` headers go to the first server alone.

    Raises:
        OSError: there is no answer, or one that says that there is nothing to be had. A PassingError may pass.
    """
    origin = _origin(url)
    for redirects in range(_REDIRECTS + 1):
        trusted = _origin(url) == origin
        answer = _asked(method, url, {**headers, **(secret if trusted else {})}, redirected=redirects > 0)
        if answer.status not in _MOVED:
            return answer
        with answer:
            answer.read(_LARGEST_PAGE)
        there = urljoin(url, answer.headers.get("Location", ""))
        before, after = urlsplit(url).scheme, urlsplit(there).scheme
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise OSError(
                errno.EINVAL, f"{_host(url)} redirects from {before}: to {after}:, which is not followed"
            )
        url = there
    raise OSError(errno.ELOOP, f"{_host(url)} redirects more than {_REDIRECTS} times")


def fetch(
    url: str,
    buffer: memoryview,
    offset: int,
    headers: Mapping[str, str],
    secret: Mapping[str, str],
    state: State,
    *,
    own: bool = True,
) -> str:
    """Fill a buffer with bytes of a file that is in a known state; returns the address that gave them.

    What fails in a way that may pass goes on with the bytes that are missing.
    """
    done = 0
    tries = waits()
    while True:
        try:
            there = url
            while done < len(buffer):
                span = f"bytes={offset + done}-{offset + len(buffer) - 1}"
                with ask("GET", url, {**headers, "Range": span}, secret) as answer:
                    require(answer, (200, 206))
                    _check(answer, offset + done, len(buffer) - done, state, own=own)
                    there = answer.url
                    done = _body(answer, buffer, done)
            return there
        except PassingError as error:
            wait = next(tries, None)
            if wait is None:
                raise
            pause(max(wait, error.wait))


def require(answer: Answer, expected: Sequence[int]) -> None:
    """Raise the OSError that a status means where it is not expected."""
    status = answer.status
    if status in expected:
        return
    text = f"{_host(answer.url)} answers {status} {http.client.responses.get(status, '')}".rstrip()
    if status in _PASSING:
        fault = PassingError(errno.EIO, text)
        after = answer.headers.get("Retry-After", "")
        fault.wait = float(after) if after.isdecimal() else 0.0
        raise fault
    if status in (401, 403):
        raise DeniedError(errno.EACCES, f"access is refused: {text}")
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, text)
    if status in (412, 416):
        raise changed()
    raise OSError(errno.EINVAL, text)


def changed() -> OSError:
    """The error for a file that is not what it was."""
    return OSError(errno.ESTALE, "it is another file by now: its size, ETag or time changed")


def close() -> None:
    """Close all connections that are kept."""
    with _lock:
        for connection in (each for several in _idle.values() for each in several):
            connection.close()
        _idle.clear()


def _check(answer: Answer, start: int, length: int, state: State, *, own: bool) -> None:
    """Refuse an answer that is not the range of the file that was asked for; `own`: its validator is the state's."""
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    whole = answer.status == 200
    if whole and (start or answer.headers.get("Content-Length") != str(length)):
        raise OSError(errno.EINVAL, f"{_host(answer.url)} gives no ranges of its files")
    if not whole and (found is None or int(found[1]) != start or int(found[2]) >= start + length):
        raise OSError(errno.EINVAL, f"{_host(answer.url)} gives other ranges than it is asked for")
    said = answer.validator
    if (found and int(found[3]) != state.size) or (own and said and said != state.identity):
        raise changed()


def _body(answer: Answer, buffer: memoryview, done: int) -> int:
    """Read a body; returns how far the buffer is filled. Raises PassingError where nothing came."""
    before = done
    try:
        while done < len(buffer):
            count = answer.read_into(buffer[done:])
            if not count:
                break
            done += count
    except (OSError, http.client.HTTPException) as error:
        if done == before:
            raise PassingError(errno.EIO, f"the connection ended: {_words(error)}") from error
        return done
    if done < len(buffer):
        if done == before:
            raise PassingError(errno.EIO, "the answer has no body")
    else:
        answer.read_into(memoryview(bytearray(1)))  # has the connection be used again
    return done


# ------------------------------------------------------------------------------------ connections


def _asked(method: str, url: str, headers: Mapping[str, str], *, redirected: bool) -> Answer:
    parts = urlsplit(url)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
    while True:
        kept = _taken(_origin(url))
        connection = kept
        try:
            connection = kept or _connected(url, redirected=redirected)
            target = path if getattr(connection, "relative", True) else f"http://{parts.netloc}{path}"
            connection.request(method, target, headers={"User-Agent": "streamconv", **headers})
            return Answer(url, connection.getresponse(), connection)
        except (OSError, http.client.HTTPException) as error:
            if connection:
                connection.close()
            if isinstance(error, OSError) and error.errno == errno.EPERM:
                raise
            # A connection that was kept may have been closed meanwhile.
            if not kept:
                raise PassingError(errno.EIO, f"no answer from {_host(url)}: {_words(error)}") from error


def _taken(origin: _Origin) -> http.client.HTTPConnection | None:
    with _lock:
        several = _idle.get(origin)
        return several.pop() if several else None


def _put_back(origin: _Origin, connection: http.client.HTTPConnection) -> None:
    with _lock:
        several = _idle.setdefault(origin, [])
        if len(several) < _KEPT:
            several.append(connection)
            return
    connection.close()


def _connected(url: str, *, redirected: bool) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    via = urlsplit(proxy) if proxy else None
    there = (via.hostname or "", via.port or 8080) if via else (host, port)
    connection: http.client.HTTPConnection
    if secure:
        connection = http.client.HTTPSConnection(*there, timeout=TIMEOUT, context=_context())
        if via:
            connection.set_tunnel(host, port)
    else:
        connection = http.client.HTTPConnection(*there, timeout=TIMEOUT)
    connection.relative = not via or secure  # type: ignore[attr-defined] # a proxy takes whole addresses
    connection.connect()
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None) or address
    if redirected and not via and (mapped.is_link_local or mapped.is_unspecified or mapped.is_multicast):
        connection.close()
        raise OSError(errno.EPERM, f"a redirect leads to {host}, a link-local address: it is not followed")
    return connection


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _host(url: str) -> str:
    return urlsplit(url).hostname or "?"


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def retried(method: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str]) -> Answer:
    """As `ask`, tried again where the failure may pass; any other status than 2xx is an OSError."""
    tries = waits()
    while True:
        try:
            answer = ask(method, url, headers, secret)
            try:
                require(answer, (200, 204, 206))
            except OSError:
                answer.__exit__()
                raise
            return answer
        except PassingError as error:
            wait = next(tries, None)
            if wait is None:
                raise
            pause(max(wait, error.wait))


# ------------------------------------------------------------------------------------------ source


def named(place: str) -> str:
    """A URL that can be the name of a place: none with a password or a signature, which would be written down.

    Raises:
        UsageError: it has one.
    """
    parts = urlsplit(place)
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in place or not parts.hostname:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UsageError(
            "a URL has a host and a path here, and nothing else",
            file=shown,
            hint="a password or a signature in it would be in plans and records; download what needs one",
        )
    return place


class WebSource(Source):
    """See `Source`. What it has looked at, it knows for as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[str, State | None] = {}
        self._listed: dict[str, list[Entry]] = {}
        self._pages = Pages()

    def state(self, place: str) -> State | None:
        place = place.rstrip("/")
        if place.endswith(":"):
            return None  # above a host
        if place not in self._known:
            above, _, name = place.rpartition("/")
            listed = self._listed.get(above)
            absent = listed is not None and all(entry.name != name for entry in listed)
            self._known[place] = None if absent else self._looked(place)
            found = self._known[place]
            if found and found.kind == "file":
                SEEN[place] = found
        return self._known[place]

    def entries(self, place: str) -> Sequence[Entry]:
        place = place.rstrip("/")
        if place not in self._listed:
            links = _Links()
            with retried("GET", f"{place}/", {}, {}) as answer:
                if "html" in answer.headers.get("Content-Type", ""):
                    links.feed(answer.read(_LARGEST_PAGE).decode(errors="replace"))
            if not links.names:
                raise NotADirectoryError(errno.ENOTDIR, "the server gives no list of what is there", place)
            self._listed[place] = [Entry(name, kind) for name, kind in sorted(links.names.items())]  # type: ignore[arg-type] # a Kind
        return self._listed[place]

    def open(self, place: str) -> OpenSource:
        state = SEEN.get(place) or self.state(place)
        if state is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", place)
        if state.kind != "file":
            raise IsADirectoryError(errno.EISDIR, "it is a directory", place)
        return self.reopen(place, state)

    def reopen(self, place: str, state: State) -> OpenSource:
        return _WebFile(place, state, self._pages)

    def _looked(self, place: str) -> State | None:
        if urlsplit(place).path in ("", "/"):
            return _DIRECTORY
        try:
            with retried("HEAD", place, {"Accept-Encoding": "identity"}, {}) as answer:
                answer.read(0)
        except FileNotFoundError:
            return None
        if answer.url.endswith("/"):
            return _DIRECTORY
        size = answer.headers.get("Content-Length", "")
        if not size.isdecimal() or not answer.validator:
            _without(place)
        return State("file", int(size), answer.validator)


def _without(place: str) -> NoReturn:
    raise OSError(
        errno.EINVAL,
        "the server does not say its size and its ETag or time, so that a change could not be noticed",
        place,
    )


class _WebFile(DistantFile):
    def __init__(self, place: str, state: State, pages: Pages) -> None:
        super().__init__(place, state.size, pages)
        self._state = state

    def fetch(self, buffer: memoryview, offset: int) -> None:
        tag = str(self._state.identity)
        strong = tag.startswith('"')
        condition = (
            {"If-Match": tag} if strong else {} if tag.startswith("W/") else {"If-Unmodified-Since": tag}
        )
        fetch(self.place, buffer, offset, {"Accept-Encoding": "identity", **condition}, {}, self._state)


class _Links(HTMLParser):
    """The names that a page of links has of what is in its directory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        link = dict(attrs).get("href") if tag == "a" else None
        name = (link or "").removeprefix("./").removesuffix("/")
        if link and name and name not in (".", "..") and not set(name) & set("/?#:\\\0"):
            self.names[name] = "directory" if link.endswith("/") else "file"
