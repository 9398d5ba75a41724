"""Conversions, side by side: re-sharding, casting, and writing transposed views out contiguously."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import samples
from bench.measure import Contender, Race, files_of, race, remove
from bench.options import Options, streamconv
from bench.report import Section, megabytes

OURS = "streamconv"
MERGEKIT = "mergekit, passthrough"

# Samples have at least this many files, so that small ones are sharded as large ones are.
_SOURCE_SHARDS, _TARGET_SHARDS = 2, 5
_LARGEST_SHARD = 5_000_000_000

# Bytes of one transposed matrix in BF16, and its sides.
_ROWS, _COLUMNS = 8192, 16384


@dataclass(frozen=True, slots=True)
class Finished:
    """A race's table, and its measurements for the figure."""

    section: Section
    races: tuple[Race, ...]


def reshard(options: Options) -> Finished:
    """BF16 shards into smaller BF16 shards, against `cp -r`."""
    source, binary, out = _places(options, "reshard")
    size = samples.write_llama(source, options.size, "BF16", _source_shard(options))
    shard = max(options.size // _TARGET_SHARDS, 1)
    contenders = [
        Contender(OURS, streamconv(source, out, "--max-shard", str(shard), "--quiet"), source, out),
        Contender("cp -r", ["cp", "-r", str(source), str(out)], source, out),
        *_alternatives(options, source, binary, out, "bfloat16", shard),
    ]
    races = _races(contenders, options)
    _clean(source, binary, out)
    return Finished(
        section(
            "Re-sharding",
            f"A BF16 Llama, {_source_files(size, options)}, into shards of {megabytes(shard)}. "
            "`cp -r` copies the same bytes without looking at them.",
            contenders, races, reference="cp -r", goal=1.05, options=options,
        ),
        races,
    )  # fmt: skip


def cast(options: Options) -> Finished:
    """F32 into BF16, against reading all input and writing all output with dd."""
    source, binary, out = _places(options, "cast")
    size = samples.write_llama(source, options.size, "F32", _source_shard(options))
    shard = max(options.size // 2 // _TARGET_SHARDS, 1)
    ours = streamconv(source, out, "--dtype", "BF16", "--max-shard", str(shard), "--quiet")
    contenders = [
        Contender(OURS, ours, source, out),
        Contender("dd", dd(files_of(source), out, 0.5), source, out),
        *_alternatives(options, source, binary, out, "bfloat16", shard),
    ]
    races = _races(contenders, options)
    _clean(source, binary, out)
    return Finished(
        section(
            "F32 to BF16",
            f"An F32 Llama, {_source_files(size, options)}, into BF16 shards of {megabytes(shard)}. `dd` reads "
            "all of the input in blocks of 8 MiB, then writes zeros of half its size, and computes nothing.",
            contenders, races, reference="dd", goal=1.10, options=options,
        ),
        races,
    )  # fmt: skip


def transpose(options: Options) -> Finished:
    """Transposed views in a `.bin` file, written out row-major, against `cp`."""
    source, _, out = _places(options, "transpose")
    count = max(options.size // (_ROWS * _COLUMNS * 2), 1)
    _baseline("transposed-bin", source, str(count), str(_ROWS), str(_COLUMNS))
    contenders = [
        Contender(OURS, streamconv(source, out, "--quiet"), source, out),
        Contender("cp -r", ["cp", "-r", str(source), str(out)], source, out),
        Contender("torch.load(mmap) + save_file", script("torch-load", source, out, "bfloat16"), source, out),
    ]
    races = _races(contenders, options)
    _clean(source, out)
    return Finished(
        section(
            "Transposing",
            f"BF16 matrices [{_ROWS}, {_COLUMNS}], {count} of them, that a `.bin` file holds as transposed views, written "
            "row-major as safetensors. `cp -r` moves as many bytes in their order.",
            contenders, races, reference="cp -r", goal=None, options=options,
        ),
        races,
    )  # fmt: skip


def _alternatives(
    options: Options, source: Path, binary: Path, out: Path, dtype: str, shard: int
) -> list[Contender]:
    if options.bare:
        return []
    _baseline("as-bin", source, binary)
    found = [
        Contender(
            "transformers, load and save",
            script("transformers", source, out, dtype, f"{max(shard // 10**6, 1)}MB"),
            source,
            out,
        ),
        Contender("torch.load(mmap) + save_file", script("torch-load", binary, out, dtype), binary, out),
    ]
    if options.mergekit is None:
        options.say("mergekit: not installed")
        return found
    recipe = options.directory / "mergekit.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {source}\ndtype: {dtype}\n")
    # mergekit counts a shard's parameters, not its bytes.
    command = [str(options.mergekit), str(recipe), str(out), "--no-copy-tokenizer", "--no-write-model-card",
               "--quiet", "--out-shard-size", str(max(shard // 2, 1))]  # fmt: skip
    return [*found, Contender(MERGEKIT, command, source, out)]


def _races(contenders: Sequence[Contender], options: Options) -> tuple[Race, ...]:
    return tuple(race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches)


def section(
    title: str,
    text: str,
    contenders: Sequence[Contender],
    races: Sequence[Race],
    *,
    reference: str,
    goal: float | None,
    options: Options,
) -> Section:
    """A race as a table: who took how long, and how much memory."""
    lines = [text]
    rows = []
    for outcome in races:
        if OURS in outcome.failures:
            lines.append(f"**streamconv failed**, source {outcome.cache}: {outcome.failures[OURS]}")
            continue
        aim = f"; the goal is at most {goal:.2f}" if goal else ""
        lines.append(
            f"Source {outcome.cache}: streamconv takes {outcome.ratio(OURS, reference)} times `{reference}`{aim}."
        )
        for contender in contenders:
            name = contender.name
            if name in outcome.failures:
                last = outcome.failures[name].splitlines()[-1].replace("|", "/")[:120]
                rows.append([name, outcome.cache, "failed", "", "", last])
                continue
            memory = outcome.anonymous(name)
            rows.append([
                name, outcome.cache,
                "1" if name == OURS else str(outcome.ratio(name, OURS)),
                megabytes(memory), f"{memory / max(outcome.anonymous(OURS), 1):.1f}",
                megabytes(outcome.resident(name)),
            ])  # fmt: skip
    if (
        options.mergekit is None
        and not options.bare
        and any("transformers" in contender.name for contender in contenders)
    ):
        lines.append("mergekit: not installed.")
    header = ["", "source", "time / streamconv's", "memory", "memory / streamconv's", "with mapped files"]
    return Section(title, "\n".join(lines), header, rows)


def _places(options: Options, part: str) -> tuple[Path, Path, Path]:
    source, binary, out = (options.directory / f"{part}-{name}" for name in ("source", "bin", "out"))
    return source, binary, out


def _source_shard(options: Options) -> int:
    return min(-(-options.size // _SOURCE_SHARDS), _LARGEST_SHARD)


def _source_files(size: int, options: Options) -> str:
    return f"{size / 1e9:.1f} GB in shards of {megabytes(_source_shard(options))}"


def script(name: str, *arguments: str | Path) -> list[str]:
    """The command of one of the baselines."""
    return [sys.executable, "-m", "bench.baselines", name, *map(str, arguments)]


def _baseline(name: str, *arguments: str | Path) -> None:
    subprocess.run(script(name, *arguments), check=True)


def dd(files: Sequence[Path], out: Path, factor: float) -> list[str]:
    """A shell that reads files, and writes as many of `factor` times their size."""
    steps = ["set -e", f"mkdir {shlex.quote(str(out))}"]
    for path in files:
        read, written = shlex.quote(str(path)), shlex.quote(str(out / path.name))
        count = int(path.stat().st_size * factor)
        steps += [
            f"dd if={read} of=/dev/null bs=8M status=none",
            f"dd if=/dev/zero of={written} bs=8M count={count} iflag=count_bytes conv=fsync status=none",
        ]
    return ["sh", "-c", "\n".join(steps)]


def _clean(*paths: Path) -> None:
    for path in paths:
        remove(path)
