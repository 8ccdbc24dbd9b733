"""Plots as SVG that takes its colours from the page around it: readable in light and dark, on paper and on a phone.

matplotlib is imported inside functions: it takes half a second.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ace_cli.report.collect import Point

#: Of text, axes and what is neither dense nor pruned nor one of many: replaced by the page's own colour.
_INK = "#010203"
#: Dense is blue and pruned is orange, wherever they are; green, amber and red are the page's, for verdicts.
DENSE, PRUNED = "#2f6fdb", "#d9642c"
#: Of everything else: methods, patterns, kinds of weights, phases.
COLOURS = ("#a04fc4", "#b08a1e", "#2493a1", "#c2569b", "#8c6d4f", "#5c4fb0", "#6f8f3f", "#6b7f99")
#: Of what is shown for comparison alone.
ASIDE = "#6b7f99"
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # knows how wide words are
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
        meaning = {"dense": DENSE, "pruned": PRUNED}
        drawn = axes.barh(range(len(names)), values, color=[meaning.get(name, ASIDE) for name in names])
        axes.bar_label(drawn, [form.format(value) for value in values], padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlabel(label)

    return draw


def over_windows(values: Sequence[float], mean: float, label: str) -> Draw:
    """A bar for each evaluation window, and the mean."""

    def draw(axes: Any) -> None:
        axes.bar(range(1, len(values) + 1), values, color=PRUNED)
        axes.axhline(mean, color=_INK, label=f"mean {mean:.3f}")
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
                colour = COLOURS[names.index(name) % len(COLOURS)]
                axes.axvspan(span["start"], span["end"], alpha=0.25, color=colour, label=label, linewidth=0)
        axes.plot(seconds, [size / 1e9 for size in sizes], color=_INK)
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


def front_plot(points: Sequence[Point], label: str) -> Draw:
    """Perplexity against what it costs, on logarithmic axes: every run with its name, a line for the best of a pattern.

    A colour is a method, a kind of line and mark is a pattern.
    """
    methods = list(dict.fromkeys(point.name for point in points))

    def draw(axes: Any) -> None:
        for number, pattern in enumerate(dict.fromkeys(point.pattern for point in points)):
            mark, dashes = _MARKS[number % len(_MARKS)], _DASHES[number % len(_DASHES)]
            mine = [point for point in points if point.pattern == pattern]
            front = sorted((point.x, point.y) for point in mine if point.best)
            axes.plot(*zip(*front, strict=True), color=_INK, drawstyle="steps-post", linestyle=dashes, linewidth=0.9)
            axes.plot([], [], color=_INK, linestyle=dashes, linewidth=0.9, marker=mark, markersize=5, label=pattern)
            colours = [_colour(point.name, methods) for point in mine]
            axes.scatter(
                [point.x for point in mine], [point.y for point in mine], c=colours, marker=mark, s=26, zorder=3
            )
        _log(axes.xaxis, [point.x for point in points])
        _log(axes.yaxis, [point.y for point in points])
        axes.margins(x=0.15, y=0.12)
        axes.set_xlabel(label)
        axes.set_ylabel("perplexity")
        _legend(axes)
        _name_points(axes, [(point.name, point.x, point.y) for point in sorted(points, key=lambda each: not each.best)])

    return draw


def grouped(groups: Mapping[str, Mapping[str, float]], dense: float | None) -> Draw:
    """Bars for each pattern, one for each method: perplexity, on a logarithmic axis from the dense one."""
    methods, above = _methods(groups), _names_above(groups)
    values = [value for of in groups.values() for value in of.values()]
    base = dense if dense is not None and dense < min(values) else min(values) / 1.1

    def draw(axes: Any) -> None:
        row, ticks, names = 0.0, [], []
        words = {"xycoords": ("axes fraction", "data"), "va": "center"}
        for pattern, of_pattern in groups.items():
            axes.annotate(pattern, (0.01, row - 0.85), fontweight="bold", **words)
            for name, value in of_pattern.items():
                row += above
                if above:
                    axes.annotate(name, (0.01, row - 0.75), fontsize=7.5, **words)
                drawn = axes.barh(row, value - base, left=base, height=0.8, color=_colour(name, methods))
                axes.bar_label(drawn, [f"{value:.4g}"], padding=3)
                ticks.append(row)
                names.append("" if above else name)
                row += 1
            row += 1
        axes.set_yticks(ticks, names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(row - 1.4, -1.4)
        _log(axes.xaxis, [base, *values])
        axes.margins(x=0.14)
        axes.set_xlabel("perplexity" + (", bars begin at the dense model's" if base == dense else ""))

    return draw


def grouped_height(groups: Mapping[str, Mapping[str, float]]) -> float:
    """Inches for ``grouped``."""
    bars = sum(map(len, groups.values()))
    return 0.7 + 0.21 * (bars * (1 + _names_above(groups)) + len(groups))


def _names_above(groups: Mapping[str, Mapping[str, float]]) -> float:
    """Rows that names take above their bars, where they are too long to stand beside them."""
    return 0.8 if max(map(len, _methods(groups))) > _LONGEST_BESIDE else 0.0


def against_sparsity(lines: Mapping[str, Mapping[str, float]]) -> Draw:
    """Times the dense perplexity. ``lines``: pattern, from left to right -> method -> ratio."""
    methods = _methods(lines)

    def draw(axes: Any) -> None:
        for name in methods:
            _method_over_patterns(axes, lines, name, color=_colour(name, methods), label=name)
        _over_patterns(axes, lines)
        _legend(axes)

    return draw


def place(lines: Mapping[str, Mapping[str, float]], here: tuple[str, float]) -> Draw:
    """The same of the runs beside one that is itself at ``here``, its pattern and ratio."""

    def draw(axes: Any) -> None:
        points = []
        for name in _methods(lines):
            points += [(name, x, y) for x, y in _method_over_patterns(axes, lines, name, color=ASIDE)]
        at = list(lines).index(here[0])
        axes.scatter([at], [here[1]], s=46, color=PRUNED, zorder=4, label=f"this run, {here[1]:.2f}")
        _over_patterns(axes, lines)
        _legend(axes)
        _name_points(axes, points)

    return draw


def _method_over_patterns(
    axes: Any, lines: Mapping[str, Mapping[str, float]], name: str, **style: Any
) -> list[tuple[float, float]]:
    """Its points; a line joins those of shares, as between N:M there is nothing."""
    found = [
        (float(place), of[name], ":" in pattern) for place, (pattern, of) in enumerate(lines.items()) if name in of
    ]
    shares = [(x, y) for x, y, of_groups in found if not of_groups]
    axes.plot([x for x, *_ in found], [y for _, y, _ in found], marker="o", markersize=4, linestyle="", **style)
    axes.plot([x for x, _ in shares], [y for _, y in shares], linewidth=0.9, color=style["color"])
    return [(x, y) for x, y, _ in found]


def _over_patterns(axes: Any, lines: Mapping[str, Mapping[str, float]]) -> None:
    axes.axhline(1, color=DENSE, linewidth=0.9, label="dense")
    axes.set_xticks(range(len(lines)), list(lines))
    axes.set_xlim(-0.5, len(lines) - 0.5)
    _log(axes.yaxis, [1.0, *(value for of in lines.values() for value in of.values())])
    axes.margins(y=0.12)
    axes.set_xlabel("pattern")
    axes.set_ylabel("perplexity, times dense")


#: Letters that leave room for bars.
_LONGEST_BESIDE = 20
#: Of patterns, where colours are methods.
_MARKS, _DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":")


def _methods(groups: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for of in groups.values() for name in of))


def _colour(name: str, methods: Sequence[str]) -> str:
    return COLOURS[methods.index(name) % len(COLOURS)]


def _log(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis that is marked in plain numbers, however few of them there are."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    wide = max(values) / min(values)
    few, some, many = (1,), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(base=10, subs=few if wide > 1000 else some if wide > 8 else many))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


#: Where the name of a point may stand, in points from it, and which end of it is there; what is nearest comes first.
_BESIDE = (
    *((6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right"), (0, 7, "center"), (0, -14, "center")),
    *((x * far, y * far, ends) for far in (1, 2, 3) for x, y, ends in (
        (10, 12, "left"), (10, -18, "left"), (-10, 12, "right"), (-10, -18, "right"), (0, 17, "center"),
        (0, -24, "center"), (16, -3, "left"), (-16, -3, "right"))),
)  # fmt: skip


def _name_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point where it covers no other name or point; with a line to it where that is far."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # lays out the axes: from now on places are what they will be
    renderer, whole = figure.canvas.get_renderer(), figure.bbox
    marks = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox([(x - 4, y - 4), (x + 4, y + 4)]) for x, y in marks]
    for number, (name, x, y) in enumerate(points):
        tried: list[tuple[float, int, Any, Any]] = []
        for right, up, end in _BESIDE:
            arrow = {"arrowstyle": "-", "linewidth": 0.4, "color": _INK} if abs(right) + abs(up) > 20 else None
            note = axes.annotate(name, (x, y), textcoords="offset points", xytext=(right, up), ha=end, fontsize=7,
                                 arrowprops=arrow)  # fmt: skip
            note.set_in_layout(False)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)
            outside = box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1
            covered = sum(_common(box, other) for at, other in enumerate(taken) if at != number)
            tried.append((covered + 1e6 * outside, len(tried), note, box))
            if not tried[-1][0]:
                break
        *_, best, box = min(tried, key=lambda each: each[:2])
        for _, _, note, _ in tried:
            if note is not best:
                note.remove()
        taken.append(box)


def _common(box: Any, other: Any) -> float:
    """The area that both cover."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))


def trials_plot(values: Sequence[float]) -> Draw:
    """Perplexity of each trial of a search, and the best one so far."""

    def draw(axes: Any) -> None:
        numbers = range(1, len(values) + 1)
        best = [min(values[:number]) for number in numbers]
        axes.scatter(numbers, values, color=COLOURS[0], s=22, zorder=3, label="trial")
        axes.plot(numbers, best, color=_INK, drawstyle="steps-post", label="best so far")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("trial")
        axes.set_ylabel("perplexity")
        _legend(axes)

    return draw
