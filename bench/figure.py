"""The figure: memory over time, streamconv and the alternatives, from one race."""

from __future__ import annotations

from pathlib import Path

from bench.measure import Race
from bench.races import OURS

FIGURE = Path(__file__).parent.parent / "docs" / "memory.png"

_COLOURS = ("#6a51a3", "#238b45", "#d94801", "#c51b8a", "#666666")


def draw(outcome: Race, title: str, path: Path = FIGURE) -> None:
    """Anonymous memory of each contender's typical run; time in units of streamconv's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    unit = outcome.typical(OURS).seconds
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    others = [name for name in outcome.results if name != OURS and not name.startswith("dd")]
    for name, colour in zip([OURS, *others], ("#08519c", *_COLOURS), strict=False):
        run = outcome.typical(name)
        seconds = [0.0, *(sample.seconds / unit for sample in run.curve), run.seconds / unit]
        gigabytes = [0.0, *(sample.anonymous / 1e9 for sample in run.curve), 0.0]
        label = f"{name}: {run.anonymous / 1e9:.2f} GB"
        axes.plot(seconds, gigabytes, color=colour, label=label, linewidth=3 if name == OURS else 1.6)
        axes.fill_between(seconds, gigabytes, color=colour, alpha=0.25 if name == OURS else 0.05)
    axes.set_xlabel("time until the output is on the disk, streamconv's = 1")
    axes.set_ylabel("anonymous memory of all processes, GB")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, title="most at once", loc="outside lower center", ncols=2)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
