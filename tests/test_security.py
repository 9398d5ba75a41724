"""What docs/security.md promises: a checkpoint of a stranger has nothing run, sent, or written elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamconv

ROOT = Path(streamconv.__file__).parent

# As `sitecustomize`, before anything else of a process: notes what it asks of the system, and what its children do.
WATCH = """
import os, sys
_log = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_SEEN = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
         "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1}
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.forkpty", "pty.spawn", "os.startfile")

def _note(event, args):
    if event == "open":
        words = ["write" if args[2] & _WRITES else "read", args[0]]
    elif event in _SEEN:
        words = ["write", *args[:_SEEN[event]]]
    elif event == "subprocess.Popen":
        words = ["run", *args[1]]
    elif event in _RUNS:
        words = ["run", event, *args]
    elif event.startswith("socket.") and event != "socket.gethostname":
        words = ["network", event, *args]
    else:
        return
    words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in words]
    os.write(_log, ("\\0".join(words) + "\\n").encode(errors="replace"))

sys.addaudithook(_note)
"""


class Watched:
    """Runs commands in a checkpoint's own directory, and knows what they asked of the system."""

    def __init__(self, place: Path, cwd: Path) -> None:
        (place / "site").mkdir()
        (place / "site" / "sitecustomize.py").write_text(WATCH)
        (place / "home").mkdir()
        self._log, self._cwd = place / "log", cwd
        self._log.touch()
        self._environment = {
            **os.environ, "PYTHONPATH": f"{place / 'site'}{os.pathsep}{ROOT.parent}", "WATCHED": str(self._log),
            "HOME": str(place / "home"), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def __call__(self, code: str, *words: object) -> tuple[int, str]:
        # As the installed command: the working directory is not on the path.
        ended = subprocess.run(
            [sys.executable, "-P", "-c", code, *map(str, words)],
            cwd=self._cwd, env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return ended.returncode, ended.stderr

    def asked(self, kind: str) -> Iterator[list[str]]:
        for line in self._log.read_text(errors="replace").splitlines():
            found, *words = line.split("\0")
            if found == kind:
                yield words

    def paths(self, words: list[str]) -> Iterator[Path]:
        """The files that words name, links followed; a number is a descriptor, of a file that was opened before."""
        return (Path(os.path.realpath(self._cwd / word)) for word in words if not word.isdecimal())


MAIN = "import sys; from streamconv.cli import main; sys.exit(main())"


class Hostile:
    """Has Python's own pickles run a command."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._marker}",)


def poisoned(place: Path, marker: Path) -> Path:
    """A model whose every file would run code in a program that imports, unpickles or trusts what lies there."""
    place.mkdir()
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("numpy", "orjson", "ml_dtypes", "xxhash", "torch", "sitecustomize", "usercustomize", "streamconv",
                 "configuration_llama", "modeling_llama", "tokenization_llama", "conftest", "setup"):  # fmt: skip
        (place / f"{name}.py").write_text(code)
    torch.manual_seed(0)
    state = {f"model.layers.{i}.w": torch.randn(64, 32) for i in range(4)}
    config = {
        "model_type": "llama", "hidden_size": 32,
        "auto_map": {"AutoConfig": "configuration_llama.X", "AutoModelForCausalLM": "modeling_llama.X"},
        "custom_pipelines": {"x": {"impl": "modeling_llama.X"}}, "trust_remote_code": True,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_llama.X", None]}})
    )
    (place / "training_args.bin").write_bytes(pickle.dumps(Hostile(marker)))
    torch.save({**state, "hook": Hostile(marker)}, place / "pytorch_model.bin")
    return place


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watched]:
    """Every command on a checkpoint, in its directory."""
    place = tmp_path_factory.mktemp("ran")
    source, out = poisoned(place / "source", place / "marker"), place / "out"
    watched = Watched(place, source)
    for words in (
        ("inspect", source), ("plan", source, out), ("convert", source, out, "--engine", "local", "--workers", "2"),
        ("verify", source, out), ("verify", out, "--headers"), ("diff", source, out), ("recipes",),
        ("convert", source, out, "--dtype", "BF16", "--overwrite", "--engine", "inline", "--verify"),
    ):  # fmt: skip
        code, said = watched(MAIN, *words)
        assert code == 0, (words, said)
    return place, watched


def test_no_code_of_a_checkpoint_is_run(ran: tuple[Path, Watched]) -> None:
    place, watched = ran
    assert not (place / "marker").exists()
    started = list(watched.asked("run"))
    assert started and all(
        words == [sys.executable, "-P", "-m", "streamconv.engines.worker"] for words in started
    )
    torch.load(place / "source" / "pytorch_model.bin", weights_only=False)
    (place / "marker").unlink()  # what it would have done


def test_no_network_is_asked_for_anything(ran: tuple[Path, Watched]) -> None:
    assert not list(ran[1].asked("network"))


def test_nothing_is_written_but_the_destination(ran: tuple[Path, Watched]) -> None:
    place, watched = ran
    written = {path for words in watched.asked("write") for path in watched.paths(words)}
    assert any(path.name.startswith("model.safetensors") for path in written)
    assert {path for path in written if not path.is_relative_to(place / "out")} <= {Path("/dev/null")}


def test_nothing_is_read_but_the_source(ran: tuple[Path, Watched]) -> None:
    """Nothing of the user's home; of the system, Python, its packages, and what describes the machine."""
    place, watched = ran
    system = map(Path, (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev/null", *filter(None, sys.path)))
    known = [path.resolve() for path in (place / "source", place / "out", place / "site", ROOT, *system)]
    read = {path for words in watched.asked("read") for path in watched.paths(words)}
    read -= {
        place.resolve(),
        place.resolve().parent,
    }  # above the destination: its name and its place's are synced
    assert any(path.is_relative_to(place / "source") for path in read)
    assert not {path for path in read if not any(path.is_relative_to(root) for root in known)}


SEEN = {
    "network": "import socket; socket.socket().connect_ex(('127.0.0.1', 9))",
    "run": "import os; os.system('true')",
    "write": "open('made', 'w')",
    "read": "open('/etc/passwd')",
}


@pytest.mark.parametrize("kind", SEEN)
def test_what_is_watched_is_seen(tmp_path: Path, kind: str) -> None:
    watched = Watched(tmp_path, tmp_path)
    watched(SEEN[kind])
    assert list(watched.asked(kind))


# ------------------------------------------------------------------------------------------- code

RUNS = {
    "dtypes.py": "the array types of NumPy and ml_dtypes, by a table",
    "ops/arrays.py": "NumPy and ml_dtypes, when they are first used",
    "writers/formats.py": "writers, by a table",
    "engines/__init__.py": "engines, by a table",
    "engines/processes.py": "its own workers, over their pipes",
    "engines/worker.py": "its own parent, over its pipe",
    "plans/registry.py": "recipes: a Python file that the user names, and entry points of installed packages",
    "storage/local.py": "the C library, for one call",
    "cli/demo.py": "the user's own cp, to compare with",
}
"""Modules that load or start something by name, and what."""

NAMES = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
MODULES = {
    "os": {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"},
    "importlib": {"import_module", "__import__", "reload"}, "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"}, "ctypes": {"CDLL", "PyDLL", "cdll"}, "runpy": {"run_path", "run_module"},
    "shelve": {"open"}, "subprocess": {"run", "Popen", "call", "check_call", "check_output", "getoutput"},
}  # fmt: skip
NETWORK = {
    "socket",
    "ssl",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "requests",
    "httpx",
    "aiohttp",
    "urllib3",
    "asyncio",
    "boto3",
    "botocore",
    "obstore",
    "huggingface_hub",
}
KNOWN = {
    ("running/destination.py", "socket"): "the host's name",
    ("running/deleted.py", "socket"): "the host's name",
    ("storage/resolve.py", "urllib"): "quoting of URLs",
    ("storage/web.py", "http"): "web servers, where a place is named by http:// or https://, and hubs",
    ("storage/web.py", "urllib"): "parts of URLs",
    ("storage/web.py", "ssl"): "encryption",
    ("storage/hub.py", "urllib"): "parts of URLs",
    (
        "storage/hub.py",
        "huggingface_hub",
    ): "the token of a hub, where a place is named by hf:// or OWNER/REPO",
    ("storage/objects.py", "obstore"): "object stores, where a place is named by s3://, gs:// or az://",
}
"""What imports something of a network, and for what."""


def that_run(tree: ast.Module) -> Iterator[str]:
    """Every call that could run what it is given."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES
        for alias in node.names
        if alias.name in MODULES[node.module]
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name(name)) if name in NAMES | aliases:
                yield name
            case ast.Attribute(ast.Name(module), name) if name in MODULES.get(module, ()) or (
                module == "os" and name.startswith(("exec", "spawn"))
            ):
                yield f"{module}.{name}"
            case ast.Name("entry_points"):
                yield "entry_points"


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_calls_that_run_something_are_seen() -> None:
    for text in ("eval(x)", "from pickle import loads as read\nread(x)", "os.execv(a, b)", "subprocess.run([])",
                 "importlib.import_module(x)", "entry_points()"):  # fmt: skip
        assert list(that_run(ast.parse(text))), text
    for text in ("model.eval()", "re.compile(x)", "os.getpid()", "pickle.dumps(x)"):
        assert not list(that_run(ast.parse(text))), text


def test_few_modules_run_anything_and_it_is_known_what() -> None:
    found = {name: calls for name, tree in trees() if (calls := list(that_run(tree)))}
    assert found.keys() == RUNS.keys()


def test_only_storages_speak_to_a_network() -> None:
    found = {
        (name, module)
        for name, tree in trees()
        for node in ast.walk(tree)
        for module in (
            [alias.name.partition(".")[0] for alias in node.names] if isinstance(node, ast.Import)
            else [(node.module or "").partition(".")[0]] if isinstance(node, ast.ImportFrom)
            else []
        )
        if module in NETWORK
    }  # fmt: skip
    assert found == KNOWN.keys()


# ---------------------------------------------------------------------------------------- names of files


def test_names_of_tensors_and_records_are_no_paths(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    names = [
        "../victim",
        "../../victim",
        str(victim),
        "..",
        "a/../../victim",
        "C:\\victim",
        "./victim",
        "~/victim",
    ]
    (tmp_path / "source").mkdir()
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "source" / "model.safetensors")
    before = {*tmp_path.iterdir()}
    for to in ("safetensors", "torch", "mindspore"):
        out = tmp_path / f"out-{to}"
        streamconv.convert(tmp_path / "source", out, to=to)
        before.add(out)
        assert {*tmp_path.iterdir()} == before
        assert len([path for path in out.iterdir() if path.name != ".streamconv"]) == 1
    assert victim.read_text() == "mine"
    assert set(load_file(tmp_path / "out-safetensors" / "model.safetensors")) == set(names)


def test_an_archive_is_never_unpacked(tmp_path: Path) -> None:
    """Records whose names lead elsewhere: refused, or not looked at."""
    torch.save({"a": torch.zeros(8)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "source.pt", "w") as bad,
    ):
        for entry in good.infolist():
            bad.writestr(entry.filename, good.read(entry))
        for name in ("../victim", "/victim", "good/../../victim", "good/data/../../../victim"):
            bad.writestr(name, b"x")
    before = {*tmp_path.rglob("*")}
    code = subprocess.run(
        [sys.executable, "-m", "streamconv", tmp_path / "source.pt", tmp_path / "out", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)}, check=False,
    ).returncode  # fmt: skip
    made = {path for path in {*tmp_path.rglob("*")} - before if not path.is_relative_to(tmp_path / "out")}
    assert code in (0, 2) and not made


def test_rights_of_a_file_do_not_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"a": torch.zeros(2)}, source / "model.safetensors")
    for name, mode in (("run.sh", 0o4755), ("open.txt", 0o666), ("config.json", 0o600)):
        (source / name).write_text("{}")
        (source / name).chmod(mode)
    old = os.umask(0o077)
    try:
        streamconv.convert(source, tmp_path / "out")
    finally:
        os.umask(old)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o7777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o700


# ------------------------------------------------------------------------------------------- links


def test_what_a_link_brings_from_elsewhere_is_said(tmp_path: Path) -> None:
    """A checkpoint may have a link to a file of the user's, which a result that is uploaded would publish."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for directory in (source, elsewhere):
        directory.mkdir()
        (directory / "notes.txt").write_text("x")
    save_file({"a": torch.zeros(2)}, source / "model.safetensors")
    (source / "again.txt").symlink_to("notes.txt")
    assert not [note for note in streamconv.plan(source).notes if "elsewhere" in note]
    (source / "key.txt").symlink_to(elsewhere / "notes.txt")
    (source / "more").symlink_to(elsewhere)
    (note,) = [note for note in streamconv.plan(source).notes if "where a link leads" in note]
    assert f"key.txt ({elsewhere}/notes.txt)" in note and f"more/notes.txt ({elsewhere}/notes.txt)" in note
    assert "again" not in note


def test_the_blobs_of_a_hub_cache_are_not_elsewhere(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0123", tmp_path / "models--x--y" / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/2")
    plan = streamconv.plan(snapshot)
    assert [file.path for file in plan.side_files] == ["tokenizer.json"]
    assert not [note for note in plan.notes if "where a link leads" in note]
