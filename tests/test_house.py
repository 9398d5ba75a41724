"""Who may know what: rules of the rooms that imports alone do not show."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

import streamconv
from streamconv import families
from streamconv.families import roles
from streamconv.writers.formats import FORMATS

ROOT = Path(streamconv.__file__).parent
MODULES = {
    ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
ABOVE = ("families", "cli", "mindformers", "__main__.py", "api.py")
"""Rooms that may name a model."""

# What else is in a model type: whose the model is, of which kind, and in which naming.
NO_MODELS = {"sat", "meta", "openai", "microsoft", "moe", "vae", "bigcode", "v"}
WITHOUT_A_TABLE = {"t5", "mistral", "gemma", "phi"}


@cache
def models() -> re.Pattern[str]:
    """What names a model that there is: the letters of its type; few letters count as a word of their own only."""
    sides = (side for recipe in families.recipes() for side in (recipe.source, recipe.target) if side)
    types = "-".join(text.lower() for side in sides for text in side.model_types)
    names = {*re.findall("[a-z]+", types), *WITHOUT_A_TABLE} - NO_MODELS
    return re.compile(
        "|".join(name if len(name) > 3 else rf"(?<![a-z]){name}(?![a-z])" for name in names), re.I
    )


def below() -> list[Path]:
    """Every module below the families."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in ABOVE]


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Every name and every text of a module but docstrings, with its line. Comments may give sources."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None  # a docstring, which is walked after this
        for field in ("value", "id", "attr", "arg", "name", "asname", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


def test_models_are_known_by_their_names() -> None:
    for text in ("LlamaForCausalLM", "is_chatglm", "qwen2_moe", "transformer.bloom", "gpt_neox.layers", "T5"):
        assert models().search(text), text
    for text in ("yield", "evaluate", "gptq", "graphics", "sat", "chat"):
        assert not models().search(text), text


def test_nothing_below_the_families_names_a_model() -> None:
    assert len(below()) > 50
    named = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in below()
        for line, text in words(path)
        if models().search(text)
    ]
    assert not named


def test_nothing_below_the_families_says_what_models_call_their_parts() -> None:
    texts = "-".join(word for names in roles.ROLES.values() for word in names)
    names = "|".join(word for word in re.findall(r"\w+", texts) if re.fullmatch(r"[a-z]+(_[a-z]+)+", word))
    said = {
        path.relative_to(ROOT).as_posix(): word
        for path in below()
        for _, text in words(path)
        for word in re.findall(rf"\b({names})\b", text)
    }
    assert said == {"readers/sat.py": "word_embeddings"}  # of a format: by it, SAT's files are known


# ------------------------------------------------------------------------------------- who opens files

OWN_FILES = {
    "cli/demo.py": "the sample that it makes and removes",
    "cli/text.py": "/dev/null",
    "mindformers/__main__.py": "what the user has, and asked for",
}
"""Modules that may touch files by a call that is seen below, and which."""

ON_PATHS = {
    "hardlink_to", "is_dir", "is_mount", "is_symlink", "iterdir", "lstat", "mkdir", "read_bytes", "rglob", "rmdir",
    "stat", "symlink_to", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
ALSO_OF_LOCATIONS = {"exists", "glob", "is_file", "open", "read_text"}
OF_MODULES = {
    "os": {
        "access", "fstat", "fsync", "ftruncate", "link", "listdir", "lstat", "makedirs", "mkdir", "open", "pread",
        "preadv", "pwrite", "remove", "rename", "replace", "rmdir", "scandir", "stat", "unlink", "walk",
    },
    "mmap": {"mmap"},
    "shutil": {"copyfile", "disk_usage", "move", "rmtree"},
}  # fmt: skip


def touches_files(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every call in a module that goes to the file system without a storage, with its line."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name("open") if "open" not in own:
                yield node.lineno, "open"
            case ast.Attribute(ast.Name(module), name) if name in OF_MODULES.get(module, ()):
                yield node.lineno, f"{module}.{name}"
            case ast.Attribute(ast.Call(ast.Name("Path")), name) if name in ON_PATHS | ALSO_OF_LOCATIONS:
                yield node.lineno, name
            case ast.Attribute(_, name) if name in ON_PATHS:
                yield node.lineno, name


def test_calls_to_the_file_system_are_seen() -> None:
    for text in ("open(x)", "os.pread(d, 1, 0)", "Path(x).open()", "path.read_bytes()", "mmap.mmap(1, 2)"):
        assert list(touches_files(ast.parse(text))), text
    for text in ("location.open()", "os.getpid()", "location.read(limit)", "text.replace(a, b)"):
        assert not list(touches_files(ast.parse(text))), text


def test_files_are_touched_by_storages_alone() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(touches_files(ast.parse(path.read_text(encoding="utf-8"))))
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] != "storage"
    }
    assert not {name: calls for name, calls in found.items() if calls and name not in OWN_FILES}
    assert not {name for name in OWN_FILES if not found.get(name)}, "rows that are not needed"


# ----------------------------------------------------------------------------------------- the rooms


def test_a_dozen_packages_and_eight_modules_stand_at_the_top() -> None:
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    modules = [path.name for path in ROOT.glob("*.py")]
    assert 5 < len(packages) <= 12, packages
    assert 3 < len(modules) <= 8, modules


BY_NAME = {
    "streamconv.writers.formats": {
        module for form in FORMATS.values() for module in (form.module, form.ranks) if module
    },
    "streamconv.engines": {"streamconv.engines.inline", "streamconv.engines.processes"},
    "streamconv.dtypes": set(),  # of other packages: ml_dtypes
    "streamconv.ops.arrays": set(),  # of other packages: numpy, ml_dtypes
}
"""Modules that import others by a name that some table gives, and which."""


def arrows(module: str, tree: ast.Module) -> Iterator[str]:
    """Every module of this package that a module imports: late ones too, for types only, and by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (each.name for each in names if each.name in MODULES)
            case ast.ImportFrom(str(package), names) if package in MODULES:
                parts = [f"{package}.{each.name}" for each in names]
                yield from (part if part in MODULES else package for part in parts)
    yield from BY_NAME.get(module, ())


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def test_imports_are_seen() -> None:
    text = "def f():\n    from streamconv.plans import codec, Plan\nimport streamconv.api\nimport streamconv_else"
    assert list(arrows("x", ast.parse(text))) == [
        "streamconv.api",
        "streamconv.plans.codec",
        "streamconv.plans",
    ]


def test_no_modules_import_each_other() -> None:
    graph = {module: set(arrows(module, parsed(module))) for module in MODULES}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()
    graph["streamconv.errors"].add("streamconv.cli")  # what a circle would be
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_imports_by_name_are_known() -> None:
    late = {name for name, path in MODULES.items() if "import_module" in path.read_text(encoding="utf-8")}
    assert late == BY_NAME.keys()
    assert set().union(*BY_NAME.values()) <= MODULES.keys()
    texts = {
        node.value
        for name in MODULES
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Constant) and node.value in MODULES
    }
    assert texts <= {*BY_NAME["streamconv.engines"], "streamconv.engines.worker", "streamconv"}


def test_the_table_of_formats_names_only_writers() -> None:
    rooms = {module.rpartition(".")[0] for module in BY_NAME["streamconv.writers.formats"]}
    assert rooms == {"streamconv.writers"}


# --------------------------------------------------------------------------------------- what is loaded

LOADED = """
import sys
from streamconv import api, cli
source = sys.argv[1]
api.open(source)
assert cli.main(["diff", source, source]) == 0
print(*(name for name in sys.modules if name.startswith("streamconv.families.")))
"""


def test_families_are_loaded_where_a_recipe_is_wanted(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file({name: numpy.zeros(4, "float32") for name in "ab"}, source)
    made = subprocess.run(
        [sys.executable, "-c", LOADED, str(source)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    loaded = {name.split(".")[2] for name in made.stdout.splitlines()[-1].split()}
    identify = {module.__module__.split(".")[2] for module in families.IDENTITIES}
    assert identify < loaded
    assert loaded <= {*identify, "roles", "splits", "llama", "llama_like", "tokenizers"}, (
        "an import at the top"
    )
