"""Hubs of models, to read from: `hf://OWNER/REPO[@REVISION][/PATH]`, by the routes of Hugging Face's.

A name is looked for in the local cache of Hugging Face's libraries first, without a request. If it is not there, whole,
the hub says which commit the revision is, and from then on the name has that: a commit never changes. One request lists
what is in it, with sizes and digests. Ranges are asked for where the hub redirects to, until that address expires.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from streamconv.errors import UsageError
from streamconv.storage import web
from streamconv.storage.distant import DistantFile, Pages
from streamconv.storage.roles import Entry, OpenSource, Source, State

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a model is called on a hub: OWNER/REPO."""

_PLACE = re.compile(rf"hf://({NAME.pattern})(?:@([^/@]+))?(?:/(.*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOTS = re.compile(r"models--[\w.-]+?--[\w.-]+", re.ASCII)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp")
_DIRECTORY = State("directory", 0, "")

_NEXT = re.compile(r"<([^>]*)>; *rel=\"next\"")
_LARGEST_ANSWER = 256 << 20

# How often an address that the hub gave is renewed for one range.
_RENEWED = 3


def named(place: str) -> str:
    """The place that a name means, with the commit that its revision is now.

    Raises:
        UsageError: it is no name, or there is no such model, or no hub can be asked.
    """
    repository, revision, path = _parts(place)
    if not _COMMIT.fullmatch(revision):
        revision = _commit(repository, revision)
    return f"hf://{repository}@{revision}" + (f"/{path}" if path else "")


def cached(place: str) -> Path | None:
    """Where the local cache has what a name means, whole; None where it has not.

    Raises:
        UsageError: it is no name.
    """
    repository, revision, path = _parts(place)
    directory = _cache() / ("models--" + repository.replace("/", "--"))
    commit = revision if _COMMIT.fullmatch(revision) else _ref(directory, revision)
    there = directory / "snapshots" / commit if commit else None
    if there is None or not there.is_dir():
        return None
    wanted = there / path if path else there
    return wanted if wanted.is_file() or (wanted.is_dir() and _is_whole(wanted)) else None


def snapshot(directory: Path) -> Path:
    """The snapshot of `main`, or the only one, where a directory is a model's in the cache; else the directory."""
    if not _SNAPSHOTS.fullmatch(directory.name) or not (directory / "snapshots").is_dir():
        return directory
    commit = _ref(directory, "main")
    there = sorted((directory / "snapshots").iterdir())
    if commit and directory / "snapshots" / commit in there:
        return directory / "snapshots" / commit
    return there[0] if len(there) == 1 else directory


class HubSource(Source):
    """See `Source`."""

    def __init__(self) -> None:
        self._pages = Pages()

    def state(self, place: str) -> State | None:
        if not _PLACE.fullmatch(place):
            return None  # above a repository
        repository, commit, path = _parts(place)
        return _tree(repository, commit).get(path)

    def entries(self, place: str) -> Sequence[Entry]:
        repository, commit, path = _parts(place)
        tree = _tree(repository, commit)
        if tree.get(path) != _DIRECTORY:
            raise NotADirectoryError(errno.ENOTDIR, "there is no such directory in the repository", place)
        inside = f"{path}/" if path else ""
        return [
            Entry(name.removeprefix(inside), state.kind, state=state)
            for name, state in sorted(tree.items())
            if name and name.startswith(inside) and "/" not in name.removeprefix(inside)
        ]

    def open(self, place: str) -> OpenSource:
        state = self.state(place)
        if state is None or state.kind != "file":
            raise FileNotFoundError(errno.ENOENT, "there is no such file in the repository", place)
        return self.reopen(place, state)

    def reopen(self, place: str, state: State) -> OpenSource:
        return _HubFile(place, state, self._pages)


class _HubFile(DistantFile):
    """A file of a commit."""

    def __init__(self, place: str, state: State, pages: Pages) -> None:
        super().__init__(place, state.size, pages)
        repository, commit, path = _parts(place)
        self._url = f"{_endpoint()}/{repository}/resolve/{commit}/{quote(path)}"
        self._state = state
        self._there: str | None = None

    def fetch(self, buffer: memoryview, offset: int) -> None:
        for _ in range(_RENEWED):
            there = self._there
            url, secret = (there, {}) if there else (self._url, _access())
            headers = {"Accept-Encoding": "identity"}
            try:
                found = web.fetch(url, buffer, offset, headers, secret, self._state, own=False)
            except (web.DeniedError, FileNotFoundError) as error:
                if not there:
                    raise type(error)(error.errno, f"{error.strerror}; {_GATED}", self.place) from None
                self._there = None  # its signature has expired
                continue
            if found != self._url:
                self._there = found
            return
        raise OSError(
            errno.EACCES, "the address that the hub gives expires before it can be used", self.place
        )


_GATED = "a model may need its terms accepted on the hub, and a token (`hf auth login`, or HF_TOKEN)"


def _parts(place: str) -> tuple[str, str, str]:
    """Repository, revision, path."""
    found = _PLACE.fullmatch(place.rstrip("/"))
    if found is None or any(part in ("", ".", "..") for part in (found[3] or "x").split("/")):
        raise UsageError(
            "this is no name on a hub",
            file=place,
            hint="write hf://OWNER/REPO, hf://OWNER/REPO@REVISION/PATH",
        )
    return found[1], unquote(found[2] or "main"), found[3] or ""


# ------------------------------------------------------------------------------------------- the cache


def _cache() -> Path:
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / below
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _ref(directory: Path, revision: str) -> str:
    """The commit that the cache last saw a revision as; empty where it saw none."""
    try:
        text = (directory / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return text if ".." not in revision and _COMMIT.fullmatch(text) else ""


def _is_whole(directory: Path) -> bool:
    """Whether a snapshot has weights, and all that its indexes name: libraries fetch single files, too."""
    files = [each for each in directory.rglob("*") if each.is_file()]
    for index in (each for each in files if each.name.endswith(".index.json")):
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if not all(isinstance(name, str) and (index.parent / name).is_file() for name in names):
            return False
    return any(each.suffix in _WEIGHTS for each in files)


# ------------------------------------------------------------------------------------------- the hub


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@cache
def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            "hubs are asked by huggingface_hub, which is not installed",
            hint="pip install 'streamconv[hub]'; a model in the local cache is read without it",
        ) from error
    return huggingface_hub


def _access() -> Mapping[str, str]:
    """The header that gives access, where there is a token."""
    token = _library().get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


@lru_cache(64)
def _commit(repository: str, revision: str) -> str:
    """The commit that a revision is; for as long as this process runs."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise _nothing(repository, "it is not in the local cache, whole, and HF_HUB_OFFLINE is set")
    found = _answer(repository, f"revision/{quote(revision, safe='')}")
    commit = found.get("sha") if isinstance(found, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _nothing(repository, "the hub does not say which commit it is")
    return commit


@lru_cache(16)
def _tree(repository: str, commit: str) -> dict[str, State]:
    """Everything in a commit by its path."""
    _library()
    tree = {"": _DIRECTORY}
    for row in _rows(repository, f"tree/{commit}?recursive=true&expand=false"):
        path = row.get("path") if isinstance(row, dict) else None
        if (
            not isinstance(path, str)
            or any(part in ("", ".", "..") for part in path.split("/"))
            or "\0" in path
        ):
            raise OSError(errno.EINVAL, f"the hub lists what no path can name: {str(path)[:80]!r}")
        above = path.split("/")[:-1]
        tree |= {"/".join(above[:depth]): _DIRECTORY for depth in range(1, len(above) + 1)}
        if row.get("type") == "directory":
            tree[path] = _DIRECTORY
            continue
        large = row.get("lfs")
        digest = f"sha256:{large.get('oid')}" if isinstance(large, dict) else f"git:{row.get('oid')}"
        size = row.get("size")
        if not isinstance(size, int) or size < 0:
            raise OSError(errno.EINVAL, f"the hub does not say the size of {path[:80]!r}")
        tree[path] = State("file", size, digest)
    return tree


def _answer(repository: str, route: str) -> Any:
    rows, _ = _asked(repository, f"{_endpoint()}/api/models/{repository}/{route}")
    return rows


def _rows(repository: str, route: str) -> list[Any]:
    """A list that may come in pages."""
    url: str | None = f"{_endpoint()}/api/models/{repository}/{route}"
    found: list[Any] = []
    while url:
        rows, url = _asked(repository, url)
        if not isinstance(rows, list):
            raise OSError(errno.EINVAL, "the hub gives no list of files")
        found += rows
    return found


def _asked(repository: str, url: str) -> tuple[Any, str | None]:
    """A document of the hub, and where the next page of it is.

    Raises:
        UsageError: there is no such model, or the hub cannot be asked.
    """
    try:
        with web.retried("GET", url, {"Accept": "application/json"}, _access()) as answer:
            document = json.loads(answer.read(_LARGEST_ANSWER))
    except (FileNotFoundError, web.DeniedError) as error:
        raise _nothing(
            repository, f"there is no such model or revision, or no access ({error.strerror})"
        ) from error
    except ValueError as error:
        raise _nothing(repository, "the hub answers with something else than JSON") from error
    except OSError as error:
        raise _nothing(repository, f"the hub cannot be asked: {error.strerror or error}") from error
    following = _NEXT.search(answer.headers.get("Link", ""))
    there = following[1] if following else None
    if there and not there.startswith(f"{_endpoint()}/"):
        raise OSError(errno.EINVAL, "the list of files goes on at another server, which is not followed")
    return document, there


def _nothing(repository: str, fault: str) -> UsageError:
    return UsageError(
        fault,
        file=f"hf://{repository}",
        hint=f"{_GATED}; or download it elsewhere: hf download {repository} --local-dir DIR, then give DIR",
    )
