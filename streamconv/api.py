"""The Python face: open, plan, convert, verify. The command line is a thin layer over these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np  # a method here is called numpy

from streamconv import families, readers, shard
from streamconv.errors import PlanError, UsageError
from streamconv.execution import memory
from streamconv.execution.evaluate import Array
from streamconv.execution.execute import Settings, Worker
from streamconv.ops import Expression
from streamconv.plans import (
    Adapter,
    Plan,
    Recipe,
    Vocabulary,
    Wanted,
    compile_plan,
    holds_edits,
    named,
    parse_edits,
    read_edits,
)
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.format import Weights
from streamconv.readers.mindspore import ckpt
from streamconv.readers.mindspore.strategy import read as read_strategy
from streamconv.running import record
from streamconv.running.comparison import Comparison
from streamconv.running.comparison import compare as compare_checkpoints
from streamconv.running.destination import check_apart, space_problem
from streamconv.running.progress import ProgressCallback
from streamconv.running.run import Conversion, run
from streamconv.running.verification import Verification, verify_plan
from streamconv.storage.location import locate
from streamconv.tensor import TensorSpec
from streamconv.writers.formats import FORMATS

if TYPE_CHECKING:
    import torch

families.register()

PathLike = str | Path
Size = str | int

DEFAULT_MAX_SHARD = "5GB"
DEFAULT_MEMORY = "1GiB"

# The Python API's slices are for looking at a tensor, one block at a time.
_ARENA = 32 << 20


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of an open checkpoint: known by its header, read when asked for."""

    expression: Expression

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        return self.expression.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.spec.shape

    def numpy(self) -> Array:
        """All of it as a new array (`ml_dtypes` types where NumPy has none of its own).

        Raises:
            UsageError: the dtype packs several elements in a byte.
        """
        return self._rows(0, self.shape)

    def torch(self) -> torch.Tensor:
        """All of it as a new torch tensor; needs torch (`pip install streamconv[torch]`)."""
        return _as_torch(self.numpy(), self.spec)

    def __getitem__(self, rows: slice) -> Array:
        """Rows [a:b] as a new array, reading only what they need."""
        if not isinstance(rows, slice) or not self.shape:
            raise UsageError("only row slices [a:b] can be taken", tensor=self.spec.name)
        start, stop, step = rows.indices(self.shape[0])
        stop = max(start, stop)
        if step != 1:
            raise UsageError(
                f"rows in steps of {step}", tensor=self.spec.name, hint="slice what you got instead"
            )
        return self._rows(start, (stop - start, *self.shape[1:]))

    def _rows(self, start: int, shape: tuple[int, ...]) -> Array:
        spec = self.spec
        if spec.dtype.packed:
            raise UsageError(f"{spec.dtype} packs several elements in a byte; NumPy cannot", tensor=spec.name)
        result: Array = np.empty(shape, spec.dtype.numpy)
        row = spec.nbytes // max(self.shape[0], 1) if self.shape else spec.nbytes
        worker = Worker(Settings(arena=_ARENA))
        try:
            worker.read(self.expression, start * row, result.reshape(-1).view(np.uint8))
        finally:
            worker.close()
        return result


@dataclass(frozen=True, slots=True)
class OpenCheckpoint(Mapping[str, LazyTensor]):
    """A checkpoint: its tensors by name, in the source's order, none of them read.

    Attributes:
        contents: what the reader found: format, components, configs, side files, notes.
    """

    contents: Checkpoint

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self.contents[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents)

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def format(self) -> str:
        """What the reader recognised."""
        return self.contents.format


def open(  # noqa: A001 - streamconv.open
    path: PathLike,
    *,
    root: str | None = None,
    ema: bool = False,
    weights: Weights | None = None,
    optimizer: bool = False,
    source_strategy: PathLike | None = None,
) -> OpenCheckpoint:
    """Open a checkpoint by its content.

    Args:
        path: a file or a directory.
        root: where the state dict lies in a torch file, as a dotted path, where that is not clear.
        ema: take the averaged weights, where a training run saved both.
        weights: of a training checkpoint, the optimizer's F32 weights (`master`, the default where there are any)
            or the model's own (`model`).
        optimizer: take what the optimizer knows of each parameter along: `optimizer/exp_avg/` and so on.
        source_strategy: MindSpore's strategy file of the source, or a directory of them; None to look for them.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint.
    """
    strategy = None if source_strategy is None else str(Path(source_strategy).absolute())
    reading = readers.Reading(root, ema, weights, optimizer, strategy)
    return OpenCheckpoint(readers.open_checkpoint(path, reading))


def plan(
    source: PathLike | OpenCheckpoint,
    destination: PathLike | None = None,
    *,
    to: str = "safetensors",
    max_shard: Size = DEFAULT_MAX_SHARD,
    tp: int = 1,
    root: str | None = None,
    ema: bool = False,
    weights: Weights | None = None,
    optimizer: bool = False,
    source_strategy: PathLike | None = None,
    pp: int = 1,
    strategy: PathLike | None = None,
    crc: bool = False,
    lora: PathLike | None = None,
    lora_scale: float | None = None,
    recipe: PathLike | Recipe | None = None,
    to_arch: str | None = None,
    reverse: bool = False,
    config: PathLike | None = None,
    like: PathLike | None = None,
    allow_unmatched: bool = False,
    pad_vocab: int | None = None,
    resize_vocab: int | None = None,
    vocab_fill: str = "mean",
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    only: Sequence[str] = (),
    dtype: str | Sequence[str] = (),
    tied: str | None = None,
    side_files: bool = True,
) -> Plan:
    """Compile and check the plan of a conversion, from headers alone.

    Args:
        source: a file or a directory, or one that is open.
        destination: where given, its disk must have room.
        to: target file format: `safetensors`, `torch`, `sat`, `mindspore` or `mindspore-safetensors`.
        max_shard: the most bytes in an output file; sizes as Hugging Face writes them.
        tp: model-parallel ranks to write, with `to="sat"` and MindSpore's formats.
        root: see `open`.
        ema: see `open`.
        weights: see `open`.
        optimizer: see `open`.
        source_strategy: see `open`.
        pp: stages of a pipeline to write, with MindSpore's formats.
        strategy: MindSpore's strategy file that says how the output is split among ranks.
        crc: end MindSpore's `.ckpt` with a checksum.
        lora: a directory with an adapter of peft, which is merged into the source.
        lora_scale: of that adapter, instead of what it says; and of a LoRA that lies unmerged in the source, where
            the default is 1 / rank.
        recipe: the name of a recipe, `auto`, a recipe's TOML or Python file, or a `Recipe`; or a TOML file of
            edits, on top of which the other edits come.
        to_arch: target architecture; finds the recipe by what the source is.
        reverse: read the recipe backwards.
        config: a `config.json` to take instead of the source's own.
        like: a checkpoint, or a directory with a config alone, whose config the target gets, and components and files that it lacks; the plan's notes
            say how the result differs from it.
        allow_unmatched: leave out tensors that the recipe does not know.
        pad_vocab: round the rows of embedding and head up to a multiple of this.
        resize_vocab: give them exactly so many rows.
        vocab_fill: new rows are the `mean` of the others, or `zero`.
        rename: `OLD=NEW` patterns.
        drop: patterns of source names to leave out.
        only: patterns of source names to keep.
        dtype: a dtype for floating-point tensors, and `PATTERN=DTYPE` exceptions.
        tied: `keep` every name of tied tensors (the default), or `drop` all but the first.
        side_files: whether configs, tokenizers and the like are copied.

    Raises:
        CheckpointError: the source cannot be read.
        UsageError: an argument cannot be read.
        PlanError: all that is wrong with the plan.
    """
    wanted_dtypes = [dtype] if isinstance(dtype, str) else list(dtype)
    edits = parse_edits(rename, drop, only, wanted_dtypes, tied or "keep")
    chosen: Recipe | Literal["auto"] | None = None
    if recipe is not None and not isinstance(recipe, Recipe) and holds_edits(recipe):
        edits = edits.over(read_edits(Path(recipe)))
    elif recipe is not None:
        chosen = recipe if isinstance(recipe, Recipe) else "auto" if recipe == "auto" else named(str(recipe))
    form = FORMATS.get(to)
    if recipe == "auto" and to_arch is None and form is not None:
        to_arch = form.to_arch or None
    acting = form.options if form is not None else frozenset()
    if tp < 1 or (tp > 1 and "tp" not in acting):
        raise UsageError(
            f"--tp {tp} with --to {to}", hint="ranks are at least 1, and written with --to sat or mindspore"
        )
    if pp < 1 or ("pp" not in acting and (pp > 1 or strategy is not None)) or (crc and "crc" not in acting):
        raise UsageError(f"--pp, --strategy and --crc with --to {to}", hint="they are for --to mindspore")
    if reverse and not isinstance(chosen, Recipe):
        raise UsageError("--reverse needs --recipe", hint="or name where to go with --to-arch")
    limit = max_shard if isinstance(max_shard, int) else shard.parse_size(max_shard)
    arguments: dict[str, Any] = {
        "to": to, "tp": tp, "max_shard": max_shard, "root": root, "recipe": _recorded(recipe),
        "ema": ema, "weights": weights, "optimizer": optimizer, "source_strategy": str(Path(source_strategy).absolute()) if source_strategy else None,
        "pp": pp, "strategy": str(Path(strategy).absolute()) if strategy else None, "crc": crc, "lora": str(Path(lora).absolute()) if lora else None, "lora_scale": lora_scale, "to_arch": to_arch, "reverse": reverse, "config": str(Path(config).absolute()) if config else None,
        "like": str(Path(like).absolute()) if like else None, "allow_unmatched": allow_unmatched,
        "pad_vocab": pad_vocab, "resize_vocab": resize_vocab, "vocab_fill": vocab_fill,
        "rename": list(rename), "drop": list(drop), "only": list(only), "dtype": wanted_dtypes, "tied": tied,
        "side_files": side_files,
    }  # fmt: skip
    opened = (
        source
        if isinstance(source, OpenCheckpoint)
        else open(
            source,
            root=root,
            ema=ema,
            weights=weights,
            optimizer=optimizer,
            source_strategy=source_strategy,
        )
    )
    checkpoint = opened.contents
    if destination is not None:
        check_apart(checkpoint.path, destination)
    wanted = Wanted(
        to=to,
        max_shard=limit,
        ranks=tp,
        stages=pp,
        strategy=None if strategy is None else read_strategy(Path(strategy)),
        crc=crc,
        edits=edits,
        recipe=chosen,
        to_arch=to_arch,
        reverse=reverse,
        config=None if config is None else readers.read_config_file(Path(config)),
        like=None if like is None else readers.open_model(like),
        lora=None if lora is None else _adapter(Path(lora), lora_scale),
        lora_scale=lora_scale,
        vocabulary=Vocabulary(pad_vocab, resize_vocab, vocab_fill) if pad_vocab or resize_vocab else None,
        allow_unmatched=allow_unmatched,
        side_files=side_files,
        arguments=arguments,
    )
    compiled = compile_plan(checkpoint, wanted)
    problem = space_problem(compiled, destination) if destination is not None else None
    if problem:
        raise PlanError("the plan does not check; nothing was written", problems=[problem])
    return compiled


def convert(
    source: PathLike | Plan,
    destination: PathLike,
    *,
    memory_budget: Size = DEFAULT_MEMORY,
    workers: int | None = None,
    engine: str | None = None,
    checksum: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback | None = None,
    **plan_arguments: Any,
) -> Conversion:
    """Convert a checkpoint, or run a plan. A run that was interrupted goes on.

    Args:
        source: a file, a directory, or a plan.
        destination: a directory of its own.
        memory_budget: bytes for all workers together.
        workers: processes; by default the processors this process may use.
        engine: `local` (processes on this machine) or `inline` (this process); by default, whichever suits the
            amount of work.
        checksum: hash also what only the kernel sees.
        overwrite: replace a finished destination, or a model that stands there.
        restart: throw an unfinished run away.
        progress: called as work is done.
        plan_arguments: see `plan`.

    Raises:
        CheckpointError, UsageError, PlanError: see `plan`.
        DestinationError: something else stands in the destination.
        ConversionError: the run failed; what it finished is kept.
    """
    limit = memory_budget if isinstance(memory_budget, int) else shard.parse_size(memory_budget)
    budget = memory.budget(limit, workers)
    compiled = _given(source, plan_arguments) if isinstance(source, Plan) else plan(source, **plan_arguments)
    if checksum and compiled.source_format == "MindSpore":
        for file in compiled.files:
            ckpt.check_crc(Path(file.path))
    return run(
        compiled,
        destination,
        budget=budget,
        engine=engine,
        checksum=checksum,
        overwrite=overwrite,
        restart=restart,
        progress=progress,
    )


def verify(
    source: PathLike | Plan,
    destination: PathLike,
    *,
    memory_budget: Size = DEFAULT_MEMORY,
    workers: int | None = None,
    engine: str | None = None,
    progress: ProgressCallback | None = None,
    **plan_arguments: Any,
) -> Verification:
    """Hold a destination against what the plan says, byte by byte. Changes nothing.

    The plan is made again from the source: with `plan_arguments` where there are any, otherwise with
    those that the destination's `conversion.json` records, otherwise with the defaults.

    Raises:
        CheckpointError, UsageError, PlanError: see `plan`.
    """
    limit = memory_budget if isinstance(memory_budget, int) else shard.parse_size(memory_budget)
    budget = memory.budget(limit, workers)
    if isinstance(source, Plan):
        compiled = _given(source, plan_arguments)
    else:
        recorded = (record.read(locate(destination)) or {}).get("arguments", {})
        compiled = plan(source, **(plan_arguments or recorded))
    return verify_plan(compiled, destination, budget, progress, engine)


def compare(
    left: PathLike, right: PathLike, *, memory_budget: Size = DEFAULT_MEMORY, values: bool = True
) -> Comparison:
    """Hold two checkpoints against each other: names, dtypes, shapes and, with `values`, elements."""
    limit = memory_budget if isinstance(memory_budget, int) else shard.parse_size(memory_budget)
    budget = memory.budget(limit, 1)
    return compare_checkpoints(
        readers.open_checkpoint(left), readers.open_checkpoint(right), budget, values=values
    )


def _adapter(path: Path, scale: float | None) -> Adapter:
    directory = path if path.is_dir() else path.parent
    config = readers.read_config_file(directory / "adapter_config.json")
    tensors = dict(readers.open_checkpoint(path).items())
    return Adapter(tensors, config, str(path), scale)


def _recorded(recipe: PathLike | Recipe | None) -> str | None:
    """A recipe as arguments name it: files by their absolute path."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe.name if recipe else None
    return str(Path(recipe).absolute()) if Path(recipe).suffix else str(recipe)


def _given(made: Plan, plan_arguments: dict[str, Any]) -> Plan:
    """A plan that was made before, to which nothing can be added."""
    if plan_arguments:
        raise UsageError(
            f"a plan is given, and {', '.join(plan_arguments)} besides", hint="make another plan"
        )
    return made


def _as_torch(array: Array, spec: TensorSpec) -> torch.Tensor:
    try:
        import torch
    except ImportError as error:
        raise UsageError("torch is not installed", hint="pip install streamconv[torch]") from error
    if spec.dtype.torch_name is None:
        raise UsageError(f"torch has no dtype for {spec.dtype}", tensor=spec.name)
    # torch cannot take ml_dtypes' arrays; the bytes are the same under an integer of that width.
    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, spec.dtype.torch_name)).reshape(spec.shape)
