"""Plots as SVG that takes its colours from the page around it: readable in light and dark, on paper and on a phone.

matplotlib is imported inside functions: it takes half a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Of text and axes, replaced by the page's own colour. No line of data has it.
_INK = "#010203"
COLOURS = ("#2f6fdb", "#d9642c", "#2a9d63", "#a04fc4", "#c9a227", "#d6447d", "#5f8f9b", "#8c6d4f")
#: Dense is blue and pruned is orange, wherever both are.
_MEANING = {"dense": COLOURS[0], "pruned": COLOURS[1]}
#: Inches: as wide as a phone shows without shrinking the letters.
WIDTH = 4.3

Draw = Callable[[Any], None]


def svg(name: str, draw: Draw, height: float = 2.5) -> str:
    """``draw(axes)`` on one pair of axes, as an <svg> element. ``name`` keeps its ids apart from other plots'."""
    stream = io.StringIO()
    with _style(_INK):
        _figure(draw, height, WIDTH).savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = stream.getvalue()[stream.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head, end, rest = text.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*pt"', "", head)
    head = head.replace("<svg ", f'<svg class="plot" role="img" aria-label="{name}" ', 1)
    return (head + end + rest).replace(_INK, "currentColor")


def png(file: Path, draw: Draw, height: float = 4.0) -> None:
    """The same as a picture on white, 1,290 pixels wide."""
    with _style("#222222"):
        _figure(draw, height, WIDTH * 1.5).savefig(file, dpi=200, facecolor="white")


def _style(ink: str) -> Any:
    import matplotlib

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "ace-prune", "font.size": 9.0, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink,
        "xtick.color": ink, "ytick.color": ink, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8.0, "lines.linewidth": 1.4,
    }  # fmt: skip
    return matplotlib.rc_context(style)


def _figure(draw: Draw, height: float, width: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    draw(axes)
    return figure


def _legend(axes: Any, columns: int = 3) -> None:
    """Above the axes, where it hides nothing; none for a single line without a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.5)


# --- one run -----------------------------------------------------------------------------------------------------


def bars(names: Sequence[str], values: Sequence[float], label: str, form: str = "{:.2f}") -> Draw:
    """Horizontal bars with their numbers, the first on top."""

    def draw(axes: Any) -> None:
        drawn = axes.barh(range(len(names)), values, color=[_MEANING.get(name, COLOURS[6]) for name in names])
        axes.bar_label(drawn, [form.format(value) for value in values], padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlabel(label)

    return draw


def over_windows(values: Sequence[float], mean: float, label: str) -> Draw:
    """A bar for each evaluation window, and the mean."""

    def draw(axes: Any) -> None:
        axes.bar(range(1, len(values) + 1), values, color=COLOURS[1])
        axes.axhline(mean, color=COLOURS[7], label=f"mean {mean:.3f}")
        axes.set_xlabel("evaluation window")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        _legend(axes)

    return draw


def over_depth(lines: Mapping[str, Sequence[float | None]], label: str, log: bool = False) -> Draw:
    """One line for each name, over the blocks."""

    def draw(axes: Any) -> None:
        for name, values in lines.items():
            points = [(block, value) for block, value in enumerate(values) if value is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", markersize=4, label=name or None)
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
        _legend(axes, 2)

    return draw


def band(low: Sequence[float], middle: Sequence[float], high: Sequence[float], largest: Sequence[float]) -> Draw:
    """Where the norms of a slot's inputs lie, over the blocks."""

    def draw(axes: Any) -> None:
        blocks = range(len(middle))
        axes.fill_between(blocks, low, high, alpha=0.3, color=COLOURS[0], label="5 % to 95 % of inputs", linewidth=0)
        axes.plot(blocks, middle, color=COLOURS[0], label="median")
        axes.plot(blocks, largest, color=COLOURS[1], label="largest")
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("input norm")
        _legend(axes)

    return draw


def memory(seconds: Sequence[float], sizes: Sequence[int], phases: Sequence[dict[str, Any]]) -> Draw:
    """Resident memory, the phases as coloured ground."""

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(span["phase"] for span in phases))
        for name in names:
            for number, span in enumerate(span for span in phases if span["phase"] == name):
                label = name if not number else None
                colour = COLOURS[(names.index(name) + 1) % len(COLOURS)]
                axes.axvspan(span["start"], span["end"], alpha=0.25, color=colour, label=label, linewidth=0)
        axes.plot(seconds, [size / 1e9 for size in sizes], color=COLOURS[0])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the start")
        axes.set_ylabel("GB in memory")
        _legend(axes, 5)

    return draw


def heat_map(rows: Sequence[str], values: Sequence[Sequence[float]]) -> Draw:
    """Sparsity: one row for each kind of weight, one column for each block; nan where there is none."""

    def draw(axes: Any) -> None:
        mesh = axes.pcolormesh(
            [[float(v) for v in row] for row in values], vmin=0, vmax=1, cmap="viridis", edgecolors="face"
        )
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.invert_yaxis()
        axes.set_xlabel("block")
        bar = axes.figure.colorbar(mesh, ax=axes, label="share of zeros")
        bar.outline.set_visible(False)

    return draw


# --- many runs ---------------------------------------------------------------------------------------------------


def length_plot(lines: dict[str, list[tuple[int, float]]]) -> Draw:
    """Perplexity against calibration length, one line for each metric (ACE, Table 20)."""

    def draw(axes: Any) -> None:
        ticks = sorted({length for points in lines.values() for length, _ in points})
        for name, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens in a calibration window")
        axes.set_ylabel("perplexity")
        _legend(axes)

    return draw


def time_plot(points: list[tuple[str, float, float, bool, str]]) -> Draw:
    """Perplexity against seconds to prune: (name, seconds, perplexity, on its pattern's Pareto front, pattern)."""

    def draw(axes: Any) -> None:
        for number, pattern in enumerate(dict.fromkeys(pattern for *_, pattern in points)):
            colour = COLOURS[number % len(COLOURS)]
            mine = [(x, y, best) for _, x, y, best, of in points if of == pattern]
            front = sorted((x, y) for x, y, best in mine if best)
            axes.plot(*zip(*front, strict=True), color=colour, drawstyle="steps-post", label=pattern)
            axes.scatter([x for x, *_ in mine], [y for _, y, _ in mine], color=colour, s=22, zorder=3)
        for name, x, y, best, _ in points:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7 if best else 5.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_xlabel("seconds to prune and write")
        axes.set_ylabel("perplexity")
        _legend(axes)

    return draw


def trials_plot(values: Sequence[float]) -> Draw:
    """Perplexity of each trial of a search, and the best one so far."""

    def draw(axes: Any) -> None:
        numbers = range(1, len(values) + 1)
        best = [min(values[:number]) for number in numbers]
        axes.scatter(numbers, values, color=COLOURS[0], s=22, zorder=3, label="trial")
        axes.plot(numbers, best, color=COLOURS[1], drawstyle="steps-post", label="best so far")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("trial")
        axes.set_ylabel("perplexity")
        _legend(axes)

    return draw
