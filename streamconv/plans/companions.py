"""The files around the weights: configs that are no longer true are rewritten, others are copied."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

import orjson

from streamconv.errors import a, listed
from streamconv.plans import registry
from streamconv.plans.findings import Findings
from streamconv.plans.loading import config_file, settled, unread
from streamconv.plans.plan import Output, SideFile, TextFile
from streamconv.plans.transform import Transformed
from streamconv.readers import small
from streamconv.readers.checkpoint import Checkpoint, Component, holds_factors
from streamconv.readers.diffusers import INDEX as PIPELINE
from streamconv.readers.sentence_transformers import INDEX as MODULES
from streamconv.readers.sentence_transformers import ROUTER
from streamconv.shard import ADAPTER_CONFIG, ADAPTER_STEMS
from streamconv.storage.location import Location, locate


def companions(
    checkpoint: Checkpoint,
    component: Component,
    made: Transformed,
    output: Output,
    findings: Findings,
) -> None:
    """Add the files around one component that are not as they were: those that a recipe makes, and the config."""
    prefix = component.prefix
    output.texts += (
        TextFile(name[1:] if name.startswith("/") else prefix + name, text)
        for name, text in made.files.texts.items()
    )
    output.left_out += (prefix + name for name in made.files.left_out)
    if made.files.left_out:
        named = ", ".join(f"{prefix}{name} ({reason})" for name, reason in made.files.left_out.items())
        findings.notes.append(f"not copied: {named}")
    merged = prefix + ADAPTER_CONFIG
    if (
        holds_factors(component)
        and made.component.stem not in ADAPTER_STEMS
        and merged in checkpoint.side_files
    ):
        output.left_out.append(merged)
        findings.notes.append(
            f"not copied: {merged} (the adapter is merged, and libraries would look for it)"
        )
    name = config_file(made.component.stem)
    if made.wrapping is not None and made.recipe is None:
        return  # it has the config of its own program
    if made.config is None or name is None or (name != "config.json" and made.config is component.config):
        return
    path = prefix + name
    by_recipe = made.recipe is not None
    config = settled(made.config, made.targets, made.shared, path, findings.notes, made=by_recipe)
    if config != component.config or path not in checkpoint.side_files:
        output.texts.append(TextFile(path, orjson.dumps(config, option=orjson.OPT_INDENT_2).decode() + "\n"))


def pipeline(
    models: Mapping[str, Transformed],
    gone: Collection[str],
    copied: Collection[SideFile],
    output: Output,
    findings: Findings,
) -> None:
    """Let the index of a pipeline name what the output holds: none of the components in the directories `gone`.

    Libraries refuse a pipeline whose index names a directory that is not there. What it says is not there is
    optional, or has to be given to them by who loads it. Where a recipe has brought one of the `models` into another
    program's naming, it is no pipeline any more, and has no index.
    """
    text = next((text for text in output.texts if text.path == PIPELINE), None)
    side = next((file for file in copied if file.path == PIPELINE), None)
    if text is None and side is None:
        return
    index = orjson.loads(text.content) if text else small.read_json(locate(side.source)) if side else None
    if not isinstance(index, dict):
        return
    others = [name for name, made in models.items() if name in index and made.recipe and _foreign(made)]
    if text is None and others:
        output.left_out.append(PIPELINE)
        # What the index alone leads to is of no use without it.
        output.left_out += (file.path for file in copied if file.path.startswith("scheduler/"))
        findings.notes.append(
            f"not copied: {PIPELINE} (diffusers loads no {', '.join(others)} in this naming)"
        )
        return
    paths = [*(file.path for file in output.files), *(text.path for text in output.texts)]
    there = {path.partition("/")[0] for path in (*paths, *(file.path for file in copied))}
    named = {
        name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None
    }
    if left := sorted(named & set(gone)):
        index |= {name: [None, None] for name in left}
        output.texts[:] = [each for each in output.texts if each is not text]
        output.texts.append(
            TextFile(PIPELINE, orjson.dumps(index, option=orjson.OPT_INDENT_2).decode() + "\n")
        )
        findings.notes.append(
            f"{PIPELINE} says that there is no {', '.join(left)}: what of it the pipeline cannot do without is given to "
            "from_pretrained, or taken along with --like PIPELINE"
        )
    if absent := sorted(named - set(gone) - there):
        findings.notes.append(
            f"{PIPELINE} names {', '.join(absent)}, which SRC does not have: taken along with --like PIPELINE"
        )


def modules(gone: Collection[str], copied: Collection[SideFile], output: Output, findings: Findings) -> None:
    """Let the list of sentence-transformers' modules name none in the directories `gone`."""
    side = next((file for file in copied if file.path == MODULES), None)
    stated = small.read_json(locate(side.source)) if side and gone else None
    if not isinstance(stated, list):
        return
    left = [each for each in stated if not (isinstance(each, dict) and each.get("path") in gone)]
    if len(left) < len(stated):
        output.texts.append(TextFile(MODULES, orjson.dumps(left, option=orjson.OPT_INDENT_2).decode() + "\n"))
        findings.notes.append(
            f"{MODULES} names no module at {', '.join(sorted(gone))}, whose weights are left out"
        )
    for file in copied:
        if PurePosixPath(file.path).name == ROUTER:
            _routes(file, gone, output, findings)


def _routes(file: SideFile, gone: Collection[str], output: Output, findings: Findings) -> None:
    """Let a router of sentence-transformers lead to no module in the directories `gone`; routes may end with that."""
    above = file.path.removesuffix(ROUTER)
    table = small.read_json(locate(file.source))
    types, structure = (table.get(key) if isinstance(table, dict) else None for key in ("types", "structure"))
    if not isinstance(types, dict) or not isinstance(structure, dict):
        return
    lost = {name for name in types if above + name in gone}
    routes = {
        route: [name for name in names if name not in lost]
        for route, names in structure.items()
        if isinstance(names, list)
    }
    routes = {route: names for route, names in routes.items() if names}
    if not lost:
        return
    made = {
        **table,
        "types": {name: kind for name, kind in types.items() if name not in lost},
        "structure": routes,
    }
    settings = table.get("parameters")
    if isinstance(settings, dict) and settings.get("default_route") not in routes:
        made["parameters"] = {**settings, "default_route": None}
    output.texts.append(TextFile(file.path, orjson.dumps(made, option=orjson.OPT_INDENT_2).decode() + "\n"))
    ended = sorted(structure.keys() - routes.keys())
    findings.notes.append(
        f"{file.path} leads to no module whose weights are left out"
        + (f", and has no route {', '.join(ended)} any more" if ended else "")
    )


def unsaid(models: Mapping[str, Transformed], paths: Collection[str]) -> Iterator[str]:
    """Which models lack the config without which a library does not load them, with the files of these `paths` around.

    A model whose files hold something around the tensors is for its own program.
    """
    bare = {
        made.component.prefix: name
        for made in models.values()
        if made.wrapping is None
        and not made.component.one_file
        and (name := config_file(made.component.stem))
        and made.component.prefix + name not in paths
    }
    if bare:
        place = "" if set(bare) == {""} else f" in {', '.join(sorted(bare))}"
        name = next(iter(bare.values()))
        yield (
            f"there is no {name}{place}, without which libraries do not load weights: --config FILE gives one, and "
            "--like DIR the files of the model that it is like"
        )


def misnamed(models: Mapping[str, Transformed]) -> Iterator[str]:
    """Which models have names that a library does not load, see `unsaid`."""
    for made in models.values():
        if made.wrapping is not None or made.component.stem in ADAPTER_STEMS:
            continue
        if note := unread(made.targets):
            yield note
        if made.recipe is None and (own := _foreign(made)):
            yield f"the names are those of {a(own)}, which libraries do not load: --to-arch makes it what they do"


def _foreign(made: Transformed) -> str | None:
    """Whose names a model has, in words, where libraries do not load those; else None."""
    tensors = {name: tensor for name, (_, tensor) in made.targets.items()}
    return registry.foreign(replace(made.component, tensors=tensors, config=made.config))


def side_files(checkpoint: Checkpoint, made: Collection[str]) -> tuple[SideFile, ...]:
    """The files to copy: all side files but those of which `made` has the path."""
    paths = {name: checkpoint.directory / name for name in sorted(checkpoint.side_files) if name not in made}
    states = ((name, path, path.state()) for name, path in paths.items())
    return tuple(SideFile(path.place, name, state.size, state.identity) for name, path, state in states)


def led_away(copied: Iterable[SideFile], directories: Iterable[Location]) -> Iterator[str]:
    """Which files are copied through links that lead out of `directories`: to whatever their author has named."""
    roots = [root for directory in directories for root in _holding(directory.canonical())]
    places = {file.path: locate(file.source).canonical() for file in copied}
    away = {
        path: place for path, place in places.items() if not any(place.is_relative_to(root) for root in roots)
    }
    if away:
        yield (
            f"copied from elsewhere, where a link leads: {listed(f'{path} ({place})' for path, place in away.items())}; "
            "see that you want them in the result"
        )


def _holding(directory: Location) -> Iterator[Location]:
    """Where the files of a directory lie: in it, or in the blobs of a Hub cache (huggingface_hub: file_download.py)."""
    yield directory
    if directory.parent.name == "snapshots":
        yield directory.parent.parent / "blobs"
