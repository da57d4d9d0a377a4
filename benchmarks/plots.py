"""The plots of docs/performance.md. What is plotted needs no matplotlib; drawing it does."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row
from benchmarks.scenarios import Scenario, parse, sweep
from benchmarks.selection import COMPARED, Selection, select
from benchmarks.tables import TIMES, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREFIX = "performance-"
GRID = ("eager", "reduce-overhead", "blade")
_COLORS = {
    "eager": "#8c8c8c",
    "eager-fast": "#b0a08a",
    "torch-compile": "#5b8db8",
    "reduce-overhead": "#4c9f70",
    "blade": "#d1495b",
}
_OTHER = "#c7c7c7"


@dataclass(frozen=True)
class Panel:
    """One set of axes: lines or bars by system."""

    title: str
    kind: str
    """`line`, `bars` or `pairs`."""
    xlabel: str
    series: dict[str, list[tuple[float, float]]]
    """Of lines: points. Of bars and pairs: one pair of a system's two figures."""


@dataclass(frozen=True)
class Plot:
    """A picture and what it says to those who do not see it."""

    name: str
    caption: str
    panels: tuple[Panel, ...]

    @property
    def file(self) -> str:
        return f"{PREFIX}{self.name}.svg"

    @property
    def digest(self) -> str:
        """Changes with what is plotted; the picture's file holds it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


def plots(rows: Sequence[Row], scenarios: Sequence[str]) -> list[Plot]:
    """The plots that the committed rows suffice for."""
    chosen = [(name, select(rows, [name], COMPARED)) for name in scenarios]
    step = [_by_system(n, s, "bars", "step_kernel_ms", "step_ms") for n, s in chosen]
    host = [_by_system(n, s, "pairs", "step_kernel_ms", "host_ms") for n, s in chosen]
    found = [
        Plot("step", "A step: the GPU at work (dark) and waiting (light).", _drawn(step)),
        Plot("host", "What a step costs the GPU and the CPU.", _drawn(host)),
    ]
    for model in ("sd15", "sdxl"):
        grid = sweep(model)
        label = "SD1.5" if model == "sd15" else "SDXL"
        native = parse(grid.batches[0]).size
        size = f"{native}{TIMES}{native}"
        panels = [
            _line(rows, grid.batches, f"{label}, {size}", "batch", lambda s: s.batch),
            _line(rows, grid.sizes, f"{label}, batch 1", "edge of the image", lambda s: s.size),
            _line(rows, grid.loras, f"{label}, {size}, batch 1", "LoRAs", lambda s: s.loras),
        ]
        caption = f"{label}: a step over batch, size and number of LoRAs, as far as measured."
        found.append(Plot(f"grid-{model}", caption, _drawn(panels)))
    return [plot for plot in found if plot.panels]


def _drawn(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    return tuple(panel for panel in panels if panel.series)


def _by_system(scenario: str, rows: Selection, kind: str, first: str, second: str) -> Panel:
    series = {}
    for system in rows.systems(()):
        pair = rows.value(scenario, system, first), rows.value(scenario, system, second)
        if pair[0] is not None and pair[1] is not None:
            series[system] = [(float(pair[0]), float(pair[1]))]
    return Panel(title(scenario), kind, "ms", series)


def _line(
    rows: Sequence[Row],
    scenarios: Sequence[str],
    heading: str,
    axis: str,
    place: Callable[[Scenario], int],
) -> Panel:
    chosen = select(rows, scenarios, GRID)
    series = {}
    for system in GRID:
        values = [(parse(s), chosen.value(s, system, "step_ms")) for s in scenarios]
        points = [(float(place(s)), float(ms)) for s, ms in values if ms is not None]
        if len(points) > 1:
            series[system] = points
    return Panel(heading, "line", axis, series)


def draw(plot: Plot, folder: Path) -> Path:
    """Write the picture; the same rows give the same file with the same matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    painters: dict[str, Callable[[Any, Panel], None]] = {
        "line": _paint_line,
        "bars": _paint_bars,
        "pairs": _paint_pairs,
    }
    settings: dict[Any, Any] = {"svg.hashsalt": "blade", "svg.fonttype": "path", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6 * len(plot.panels), 3.1), layout="constrained")
        for index, panel in enumerate(plot.panels):
            axes = figure.add_subplot(1, len(plot.panels), index + 1)
            painters[panel.kind](axes, panel)
            axes.set_title(panel.title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        file = folder / plot.file
        about = {"Date": None, "Creator": None, "Description": f"data {plot.digest}"}
        figure.savefig(file, metadata=about)
    return file


def drawn_digest(file: Path) -> str:
    """The digest of what a picture shows."""
    found = re.search(r"data ([0-9a-f]{16})", file.read_text(encoding="utf-8"))
    return found[1] if found else ""


def _paint_line(axes: "Axes", panel: Panel) -> None:
    for system, points in panel.series.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=4, color=_COLORS[system], label=system)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel("ms a step")
    axes.set_xticks(sorted({x for points in panel.series.values() for x, _ in points}))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _paint_bars(axes: "Axes", panel: Panel) -> None:
    for index, (system, [(busy, wall)]) in enumerate(panel.series.items()):
        color = _COLORS.get(system, _OTHER)
        axes.barh(index, wall, color=color, alpha=0.4)
        axes.barh(index, min(busy, wall), color=color)
        axes.text(wall, index, f" {wall:.1f}", va="center")
    axes.set_yticks(range(len(panel.series)), list(panel.series))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms a step")


def _paint_pairs(axes: "Axes", panel: Panel) -> None:
    for index, (system, [(gpu, host)]) in enumerate(panel.series.items()):
        color = _COLORS.get(system, _OTHER)
        axes.barh(index - 0.2, gpu, 0.36, color=color)
        axes.barh(index + 0.2, host, 0.36, color=color, alpha=0.4, hatch="//")
        axes.text(gpu, index - 0.2, f" {gpu:.1f} GPU", va="center")
        axes.text(host, index + 0.2, f" {host:.1f} CPU", va="center")
    axes.set_yticks(range(len(panel.series)), list(panel.series))
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("ms a step")
