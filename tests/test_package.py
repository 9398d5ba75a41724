"""What is built of the repository: a wheel that is the same whenever it is built, and a source archive that is whole."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import streamconv

ROOT = Path(__file__).parent.parent
# Of whoever runs the tests: none of it may be in what is built.
GIT = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=x", "-c", "safe.directory=*")  # fmt: skip
COMMITTED = "2026-01-02T03:04:06Z"


def tracked() -> list[str]:
    listed = subprocess.run([*GIT, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("not a repository of git")
    return names


def committed(place: Path) -> Path:
    """A repository with one commit of what is tracked here, as it stands."""
    place.mkdir(parents=True)
    for name in tracked():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    environment = {**os.environ, "GIT_AUTHOR_DATE": COMMITTED, "GIT_COMMITTER_DATE": COMMITTED}
    for words in (("init", "-q"), ("add", "-A", "-f"), ("commit", "-q", "-m", "x")):
        subprocess.run([*GIT, *words], cwd=place, env=environment, check=True)
    return place


def built(place: Path, out: Path, umask: int) -> tuple[Path, Path]:
    """The wheel and the source archive of a repository."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [place / ".ci" / "package", out]
    subprocess.run(command, cwd=place, env=environment, umask=umask, check=True)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("package")
    return built(committed(place / "here"), place / "out", 0o022)


def test_a_wheel_is_the_same_whenever_and_wherever_it_is_built(
    packages: tuple[Path, Path], tmp_path: Path
) -> None:
    there = committed(tmp_path / "some" / "where" / "else")
    for path in there.rglob("*.py"):
        os.utime(path, (10**9, 10**9))
    wheel, _ = built(there, tmp_path / "out", 0o077)
    assert wheel.name == packages[0].name and wheel.read_bytes() == packages[0].read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2026, 1, 2, 3, 4, 6)}
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} <= {0o644, 0o664}


def test_a_wheel_holds_the_program_and_nothing_else(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = archive.read(metadata).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    assert names == {name for name in tracked() if name.startswith("streamconv/")} >= {"streamconv/py.typed"}
    assert f"\nVersion: {streamconv.__version__}\n" in about
    assert str(ROOT) not in about


def test_a_source_archive_holds_what_is_tracked(packages: tuple[Path, Path]) -> None:
    with tarfile.open(packages[1]) as archive:
        entries = archive.getmembers()
    assert all(entry.isreg() or entry.isdir() for entry in entries)
    names = {entry.name.partition("/")[2] for entry in entries if entry.isreg()}
    made = {name for name in names if name.startswith("streamconv.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == set(tracked()) and made <= names


def test_a_wheel_installs_and_runs(packages: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment that has what it depends on, and not the repository on its path."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "lib"]  # fmt: skip
    subprocess.run([*install, packages[0]], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    for command in ([tmp_path / "lib" / "bin" / "streamconv"], [sys.executable, "-P", "-m", "streamconv"]):
        said = subprocess.run(
            [*command, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert said.stdout == f"streamconv {streamconv.__version__}\n"
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import streamconv.api as it; print(it.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "lib")


def test_a_wheel_asks_for_what_it_imports_and_no_more(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[0]) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = archive.read(metadata).decode()
        trees = [ast.parse(archive.read(name)) for name in archive.namelist() if name.endswith(".py")]
    needs = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", about, re.MULTILINE))
    extra = set(
        re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*; extra == "(?:torch|remote|hub)"$', about, re.MULTILINE)
    )
    imported = {
        name.partition(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [node.value] if isinstance(node, ast.Constant) and node.value == "ml_dtypes"
            else []
        )
    }  # fmt: skip
    assert imported - sys.stdlib_module_names - {"streamconv"} == needs | extra


# ---------------------------------------------------------------------------------- what it is built from


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        Requirement(each) for each in (*project["dependencies"], *project["optional-dependencies"]["test"])
    ]


def test_the_lock_has_all_that_is_asked_for_and_nothing_of_a_machine() -> None:
    lines = (ROOT / ".ci" / "lock.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", "".join(parts)) for parts in pinned)
    versions = {name: version for name, _, version in pinned}
    for need in requirements():
        assert need.specifier.contains(versions[canonicalize_name(need.name)]), f"{need}: run .ci/lock"


def imported(path: Path) -> set[str]:
    """What a file imports when it is imported itself: modules, and names of them, which may be modules."""
    names = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return names


def test_the_lowest_versions_are_tested_without_anything_else() -> None:
    """The tests that `.ci/lowest` takes, and what they import of each other, import what users get and what it installs."""
    said = subprocess.run([ROOT / ".ci" / "lowest", "--list"], capture_output=True, text=True, check=True)
    left = [ROOT / name for name in said.stdout.split()]
    assert len(left) > 12
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = {
        "streamconv",
        "pytest",
        "hypothesis",
        *(Requirement(each).name for each in project["dependencies"]),
    }
    seen, foreign = set[Path](), set[tuple[str, str]]()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path):
            top, place = name.partition(".")[0], name.replace(".", "/")
            roots = [
                root for root in (ROOT / "tests", ROOT) if [*root.glob(f"{top}.py"), *root.glob(f"{top}/")]
            ]
            if top in there | sys.stdlib_module_names and name != "safetensors.torch":
                continue
            if not roots:
                foreign.add((path.name, name))
            left += [
                each
                for root in roots
                for each in (root / f"{place}.py", root / place / "__init__.py")
                if each.is_file()
            ]
    assert not foreign


def test_every_dependency_has_a_lowest_version() -> None:
    """Which `.ci/lowest` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(re.fullmatch(r"[\w.-]+>=[0-9.]+", need) for need in project["dependencies"])


def judged(report: object) -> tuple[int, list[str]]:
    path = ROOT / ".ci" / "audit"
    loader = SourceFileLoader("audit", str(path))
    spec = spec_from_loader("audit", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    code, lines = module.judged(report, {"numpy", "ml-dtypes"})
    return code, lines


SKIPPED = {"name": "numpy", "version": "2.0", "skip_reason": "not found"}
CLEAN = {"name": "ml_dtypes", "version": "0.5", "vulns": []}
BAD = {"id": "X-1", "fix_versions": ["3"]}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([SKIPPED, SKIPPED], 0, "NOT RUN"),
        ([], 0, "NOT RUN"),
        ([SKIPPED, CLEAN], 0, "NOT AUDITED: numpy"),
        ([CLEAN, {**CLEAN, "name": "numpy"}], 0, "2 of 2 packages, 0 known"),
        ([CLEAN, {**CLEAN, "name": "NumPy", "vulns": [BAD]}], 1, "NumPy 0.5: X-1, mended in 3"),
        ([CLEAN, {**CLEAN, "name": "pytest", "vulns": [BAD]}], 0, "pytest 0.5: X-1"),
    ],
)
def test_an_audit_is_judged_by_what_users_get(rows: list[dict[str, object]], code: int, said: str) -> None:
    ended, lines = judged({"dependencies": rows})
    assert ended == code and any(said in line for line in lines), lines
