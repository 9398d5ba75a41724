"""From a checkpoint's headers and what is wanted of it to a checked plan. Reads no tensor data.

    1. `transform` each component: what its targets are, as expressions.
    2. `place` them: into which files, at which offsets.
    3. `companions`: the files around the weights.

What every step finds is collected, and problems are raised together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath

from streamconv.errors import PlanError, Problem, listed
from streamconv.ops import leaves
from streamconv.options.fields import fields, recorded
from streamconv.options.records import PlanOptions
from streamconv.options.spelling import either, quoted
from streamconv.plans.adapters.adapter import Adapter
from streamconv.plans.adapters.forms import FORMS as ADAPTER_FORMS
from streamconv.plans.adapters.forms import is_adapter
from streamconv.plans.adapters.places import assigned
from streamconv.plans.casts import without_effect
from streamconv.plans.companions import companions, led_away, misnamed, modules, pipeline, side_files, unsaid
from streamconv.plans.edits import unused
from streamconv.plans.findings import Findings
from streamconv.plans.likeness import adopted, compare, complete, placed
from streamconv.plans.patterns import Pattern
from streamconv.plans.placement import is_unfit, place, unfitting
from streamconv.plans.plan import Output, Plan, PlannedTensor, SideFile, SourceFile, TextFile
from streamconv.plans.transform import Transformed, transform
from streamconv.plans.trial.trial import MARK, is_trial, trial, uncounted
from streamconv.plans.wanted import Wanted
from streamconv.readers.checkpoint import Checkpoint
from streamconv.storage.first_seen import first_seen
from streamconv.storage.location import locate
from streamconv.writers.formats import ALONE, FORMATS

# Files whose states are asked for at once.
_AT_ONCE = 8


def compile_plan(checkpoint: Checkpoint, wanted: Wanted) -> Plan:
    """Compile and check a plan.

    Raises:
        PlanError: all that is wrong.
    """
    if wanted.to_arch in ADAPTER_FORMS and any(map(is_adapter, checkpoint.models)):
        wanted = replace(wanted, base=wanted.like, like=None)
    checkpoint = adopted(checkpoint, wanted)
    wanted = placed(checkpoint, wanted)
    output = Output()
    used: set[Pattern] = set()
    names, notes = list(checkpoint), checkpoint.notes
    if is_trial(wanted):
        cut = trial(checkpoint, wanted, used)
        checkpoint, wanted, notes = cut.checkpoint, cut.wanted, (cut.note, *notes)
        output.texts += () if wanted.file else cut.marks
    elif MARK in checkpoint.side_files:
        notes = (f"the source is a trial of a few layers, not the whole model ({MARK})", *notes)
    findings = Findings(notes=list(notes))
    models, apart = _each_component(checkpoint, wanted, used, output, findings)
    if wanted.file:
        _one_file(models, apart > 0, wanted, output, findings)
    elif wanted.options["side_files"]:
        output.texts += (TextFile(path, content) for path, content in checkpoint.texts.items())
    findings.problems += unused(wanted.edits, used, names)
    if all(made.recipe is None for made in models.values()):
        findings.problems += without_effect((made.casting for made in models.values()), wanted.edits.dtype)
    if wanted.like is not None and not findings.problems:
        if not wanted.file:
            complete(wanted.like, models, wanted, output, findings)
        compare(wanted.like, models, wanted, len(output.files) - apart, findings)
    if checkpoint.ignored and not wanted.file:
        findings.notes.append(f"not copied: {listed(ignored.path for ignored in checkpoint.ignored)}")
    if not output.tensors and not findings.problems:
        findings.problems.append(Problem("no tensor is left to write", hint="see --only and --drop"))
    files = _source_files(checkpoint, output.tensors)
    findings.problems += _unwritable(checkpoint, [file.path for file in files], wanted, output)
    if findings.problems:
        raise PlanError("the plan does not check; nothing was written", problems=findings.problems)
    beside = wanted.options["side_files"] and not wanted.file
    if not beside:
        findings.notes += _not_around(checkpoint, wanted, models)
    if FORMATS[wanted.options["to"]].beside_config:
        findings.notes += misnamed(models)
    copied = _around(checkpoint, wanted, models, output, findings) if beside else ()
    _require_still(checkpoint, wanted, files, copied)
    return Plan(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        target_format=wanted.options["to"],
        files=files,
        tensors=tuple(output.tensors),
        outputs=tuple(output.files),
        # Indices are written last.
        texts=tuple(sorted(output.texts, key=lambda text: (".index." in text.path, text.path))),
        side_files=copied,
        checks=tuple(findings.checks),
        checksums=checkpoint.checksums,
        dropped=tuple(findings.dropped),
        notes=tuple(findings.notes),
        arguments=recorded(PlanOptions, wanted.options),
    )


def _each_component(
    checkpoint: Checkpoint, wanted: Wanted, used: set[Pattern], output: Output, findings: Findings
) -> tuple[dict[str, Transformed], int]:
    """What becomes of each component, and where it is written.

    Patterns of edits that match are added to `used`.

    Returns:
        The models by their directory, and the number of files with optimizer state.
    """
    models: dict[str, Transformed] = {}
    apart = 0
    unfit: list[Transformed] = []
    adapters: Mapping[str, tuple[Adapter, ...]] = {}
    with findings.collecting():
        adapters = assigned(checkpoint.models, wanted.lora)
    for component in checkpoint.components:
        own = replace(wanted, lora=adapters.get(component.directory, ()))
        made = transform(checkpoint, component, own, used, findings)
        if made is None or not made.targets:
            continue
        if is_unfit(made, wanted):
            unfit.append(made)
            continue
        first = len(output.files)
        place(made, wanted, output, findings)
        if component.kind == "optimizer":
            apart += len(output.files) - first
        else:
            models[made.component.directory] = made
        if wanted.options["side_files"] and not wanted.file:
            companions(checkpoint, component, made, output, findings)
            if made.recipe is None and not is_trial(wanted):
                findings.notes += uncounted(component, made.targets, made.config)
    findings.problems += unfitting(unfit, wanted, others=bool(models))
    return models, apart


def _one_file(
    directories: Collection[str], optimizer: bool, wanted: Wanted, output: Output, findings: Findings
) -> None:
    """See that the output is the one file that is wanted, and say if another kind of file is called so."""
    if len(output.files) > 1 and optimizer:
        message = "the optimizer state is in files of its own, and the destination is one file"
        findings.problems.append(Problem(message, hint="name a directory, or leave --optimizer out"))
    elif len(output.files) > 1:
        parts = sorted(directories)
        findings.problems.append(
            Problem(
                f"there is a file for each of {', '.join(parts)}, and the destination is one file",
                hint=f"name a directory, or take one of them: --only {quoted(next(filter(None, parts)) + '/*')}",
            )
        )
    to, suffix = wanted.options["to"], PurePosixPath(wanted.file or "").suffix.lower()
    others = [each for each in ALONE[suffix] if FORMATS[each].suffix == suffix and FORMATS[each].to_arch]
    if others and FORMATS[to].suffix != suffix:
        findings.notes.append(
            f"a {suffix} file of --to {to} is written; --to {either(others)} makes another kind"
        )


def _not_around(checkpoint: Checkpoint, wanted: Wanted, models: Mapping[str, Transformed]) -> Iterator[str]:
    """What is said where nothing is written around the weights."""
    why = "the destination is one file" if wanted.file else "--no-side-files"
    known = any(made.config is not None for made in models.values())
    if checkpoint.side_files or known or wanted.config is not None or wanted.like is not None:
        yield f"{why}: config, tokenizer and the like are not written"
    if FORMATS[wanted.options["to"]].beside_config and not known and wanted.file:
        yield from unsaid(models, ())


def _around(
    checkpoint: Checkpoint,
    wanted: Wanted,
    models: Mapping[str, Transformed],
    output: Output,
    findings: Findings,
) -> tuple[SideFile, ...]:
    """The files to copy; what libraries look for around the models, in the directories `models`, is settled with them."""
    taken = {text.path for text in output.texts} | {file.path for file in output.files} | set(output.left_out)
    written = {str(above) for file in output.files for above in PurePosixPath(file.path).parents}
    gone = {component.directory for component in checkpoint.models} - {"", *written}
    copied = [file for file in side_files(checkpoint, taken) if file.path.partition("/")[0] not in gone]
    if wanted.like is not None:
        copied += side_files(wanted.like, taken | {file.path for file in copied})
    pipeline(models, gone, copied, output, findings)
    modules(gone, copied, output, findings)
    if FORMATS[wanted.options["to"]].beside_config:
        paths = {text.path for text in output.texts} | {file.path for file in copied}
        findings.notes += unsaid(models, paths)
    made = {text.path for text in output.texts} | set(output.left_out)
    left = tuple(file for file in copied if file.path not in made)
    findings.notes += led_away(
        left, [each.directory for each in (checkpoint, wanted.like) if each is not None]
    )
    return left


def _unwritable(
    checkpoint: Checkpoint, files: Iterable[str], wanted: Wanted, output: Output
) -> Iterator[Problem]:
    """Paths and names of bytes that are no UTF-8, which plan and record could not say."""

    def odd(text: str) -> bool:
        return text != text.encode(errors="ignore").decode()

    made = (*(file.path for file in output.files), *(text.path for text in output.texts))
    beside = checkpoint.side_files if wanted.options["side_files"] and not wanted.file else ()
    for path in filter(odd, dict.fromkeys((str(checkpoint.path), *files, *made, *beside))):
        hint = "rename it, or make a link to it under another name"
        yield Problem("the path is not UTF-8, which no plan can hold", file=path, hint=hint)
    known = fields(PlanOptions)
    for option, value in recorded(PlanOptions, wanted.options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and odd(text):
                yield Problem(
                    f"{known[option].flag} is not UTF-8, which no plan can hold", hint="rename what it names"
                )


def _require_still(
    checkpoint: Checkpoint, wanted: Wanted, files: Sequence[SourceFile], copied: Sequence[SideFile]
) -> None:
    """Refuse files that are not what they were when their headers were read: the plan would be one of both.

    Raises:
        PlanError: names all of them.
    """
    places = [checkpoint.path, *(place for adapter in wanted.lora for place in adapter.places)]
    seen = first_seen([*places, wanted.like.path] if wanted.like is not None else places)
    problems = [
        Problem("it was written to while its header was read", file=path)
        for path, size, identity in (
            *((file.path, file.size, file.identity) for file in files),
            *((file.source, file.size, file.identity) for file in copied),
        )
        if path in seen and (seen[path].size, seen[path].identity) != (size, identity)
    ]
    if problems:
        hint = "run it again when nothing writes there"
        raise PlanError("the source changed", hint=hint, problems=problems)


def _source_files(checkpoint: Checkpoint, tensors: Sequence[PlannedTensor]) -> tuple[SourceFile, ...]:
    paths = dict.fromkeys(checkpoint.files)
    for tensor in tensors:
        for leaf in leaves(tensor.expression):
            paths.update(dict.fromkeys(extent.file for extent in leaf.extents))
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # in a store or on a network disk, mostly waiting
        states = pool.map(lambda path: locate(path).state(), paths)
        return tuple(
            SourceFile(path, state.size, state.identity) for path, state in zip(paths, states, strict=True)
        )
