"""The tables of docs/performance.md, as Markdown. What was not measured is said so."""

from collections.abc import Callable, Sequence

from benchmarks.kinds import KINDS
from benchmarks.scenarios import Scenario, parse
from benchmarks.selection import Selection

NOT_MEASURED = "not measured"
TIMES = "\u00d7"  # a multiplication sign
NONE = "\u2013"  # a dash: does not apply, or is not in the row
_MODELS = {"sd15-full": "SD1.5", "sdxl-full": "SDXL"}

Column = tuple[str, Callable[[str], str]]
"""A heading, and what a system's cell says."""


def title(scenario: str) -> str:
    """A scenario in words."""
    found = parse(scenario)
    if found.kind == "vae":
        return f"{_size(found)}, batch {found.batch}"
    words = [_MODELS[found.model], _size(found), f"batch {found.batch}"]
    if found.controlnets:
        words.append(f"{found.controlnets} ControlNet{'s' * (found.controlnets > 1)}")
    if found.loras:
        words.append(f"{found.loras} LoRA{'s' * (found.loras > 1)}")
    return ", ".join(words)


def _size(scenario: Scenario) -> str:
    return f"{scenario.size}{TIMES}{scenario.size}"


def number(value: float | None, unit: str = "", digits: int | None = None) -> str:
    """A figure with about three significant digits."""
    if value is None:
        return NONE
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit}"


def speed(rows: Selection, scenario: str) -> list[str]:
    """Step times of all systems, and how many times Blade is as fast."""

    def faster(system: str) -> str:
        mine = rows.value(scenario, "blade", "step_ms")
        theirs = rows.value(scenario, system, "step_ms")
        same = system == "blade"
        return number(theirs / mine, TIMES, 2) if mine and theirs and not same else NONE

    return _by_system(
        rows,
        scenario,
        ("step", _cell(rows, scenario, "step_ms", " ms")),
        ("p90", _cell(rows, scenario, "step_ms_p90", " ms")),
        ("image", _image(rows, scenario)),
        ("Blade's speed-up", faster),
        ("latents", _latents(rows, scenario)),
    )


def time_split(rows: Selection, scenario: str) -> list[str]:
    """Where a step's time goes: on the GPU, on the CPU, and how near the GPU is to its peak."""

    def share(system: str) -> str:
        value = rows.value(scenario, system, "peak_share")
        return NONE if value is None else f"{100 * value:.0f} %"

    return _by_system(
        rows,
        scenario,
        ("step", _cell(rows, scenario, "step_ms", " ms")),
        ("GPU busy", _cell(rows, scenario, "step_kernel_ms", " ms")),
        ("GPU waits", _gap(rows, scenario)),
        ("CPU", _cell(rows, scenario, "host_ms", " ms")),
        ("kernels", _cell(rows, scenario, "kernels_per_step", digits=0)),
        ("launches", _cell(rows, scenario, "launches_per_step", digits=0)),
        ("TFLOP", _cell(rows, scenario, "tflop_per_step")),
        ("of the matrix rate", share),
    )


def kinds(rows: Selection, scenario: str) -> list[str]:
    """What the GPU's time goes to; nothing for rows of a time when that was not noted."""

    def column(kind: str) -> Column:
        def cell(system: str) -> str:
            found = rows.row(scenario, system) or {}
            return number((found.get("kinds_ms") or {}).get(kind), " ms")

        return kind, cell

    noted = [(rows.row(scenario, system) or {}).get("kinds_ms") for system in rows.systems()]
    if not any(noted):
        return []
    intro = "What its kernels do there, each kind's time by itself:"
    return ["", intro, "", *_by_system(rows, scenario, *map(column, KINDS))]


def costs(rows: Selection, scenario: str) -> list[str]:
    """What a system costs: start-up and memory."""
    return _by_system(
        rows,
        scenario,
        ("first image", _first(rows, scenario)),
        ("second image", _cell(rows, scenario, "warm_first_image_s", " s")),
        ("capture", _cell(rows, scenario, "capture_ms", " ms")),
        ("graphs", _cell(rows, scenario, "graphs", digits=0)),
        ("tensors", _cell(rows, scenario, "peak_vram_gib", " GiB")),
        ("reserved", _cell(rows, scenario, "peak_reserved_gib", " GiB")),
        ("device", _cell(rows, scenario, "peak_device_gib", " GiB")),
        ("allocator", _text(rows, scenario, "allocator")),
    )


_STARTS = (
    ("first image", "first_image_s", " s", None),
    ("second image", "warm_first_image_s", " s", None),
    ("compiled", "graphs", "", 0),
    ("loaded", "graphs_loaded", "", 0),
    ("loading", "load_s", " s", None),
)


def starts(rows: Selection, scenario: str, systems: Sequence[str]) -> list[str]:
    """First images of new processes, with and without graphs on disk."""
    lines = [[system, *_start(rows, scenario, system)] for system in systems]
    return table([title(scenario), *(heading for heading, *_ in _STARTS)], lines)


def sizes(rows: Selection, scenarios: Sequence[str]) -> list[str]:
    """First images of sizes that come one after the other in one process."""
    lines = [[title(scenario), *_start(rows, scenario, "blade")] for scenario in scenarios]
    return table(["one after the other", *(heading for heading, *_ in _STARTS)], lines)


def _start(rows: Selection, scenario: str, system: str) -> list[str]:
    return [
        number(rows.value(scenario, system, field), unit, digits)
        for _, field, unit, digits in _STARTS
    ]


def kernels(rows: Selection, scenario: str, systems: Sequence[str], base: str) -> list[str]:
    """What systems with some of Blade's own kernels gain over `base`, without any; or, where that
    is Blade with all of them, what each is worth that a system is without."""
    against = rows.value(scenario, base, "step_kernel_ms")
    name, sign = ("worth", 1) if base == "blade" else ("gained", -1)

    def difference(system: str) -> str:
        busy = rows.value(scenario, system, "step_kernel_ms")
        if busy is None or against is None or system == base:
            return NONE
        return number(sign * (busy - against), " ms", 2)

    columns: tuple[Column, ...] = (
        ("step", _cell(rows, scenario, "step_ms", " ms")),
        ("GPU busy", _cell(rows, scenario, "step_kernel_ms", " ms")),
        (name, difference),
        ("kernels", _cell(rows, scenario, "kernels_per_step", digits=0)),
        ("latents", _latents(rows, scenario)),
    )
    lines = [[system, *(cell(system) for _, cell in columns)] for system in systems]
    return table([title(scenario), *(head for head, _ in columns)], lines)


def steps(rows: Selection, scenarios: Sequence[str], systems: Sequence[str]) -> list[str]:
    """Step times (and the GPU's own) of several scenarios, one a line."""

    def cell(scenario: str, system: str) -> str:
        wall = rows.value(scenario, system, "step_ms")
        busy = rows.value(scenario, system, "step_kernel_ms")
        if wall is None:
            return missing(rows, scenario, system)
        return f"{number(wall)} ({number(busy)})" if busy else number(wall)

    def best(scenario: str) -> str:
        mine = rows.value(scenario, "blade", "step_ms")
        peers = [rows.value(scenario, s, "step_ms") for s in systems if not s.startswith("blade")]
        measured = [value for value in peers if value]
        return number(min(measured) / mine, TIMES, 2) if mine and measured else NONE

    lines = [[title(s), *(cell(s, system) for system in systems), best(s)] for s in scenarios]
    return [
        *table(["ms a step (of it GPU)", *systems, "best peer / Blade"], lines),
        *errors(rows, scenarios),
    ]


def switches(rows: Selection, scenarios: Sequence[str], systems: Sequence[str]) -> list[str]:
    """What other LoRAs cost: ms of the nodes and of loading the model, and times stock's speed."""

    def parts(scenario: str, system: str) -> list[float]:
        fields = ("chain_ms", "switch_ms")
        found = [rows.value(scenario, system, field) for field in fields]
        return [ms for ms in found if ms is not None]

    def cell(scenario: str, system: str) -> str:
        mine, stock = parts(scenario, system), sum(parts(scenario, "eager"))
        if not mine:
            return missing(rows, scenario, system)
        text = f"{' + '.join(number(ms) for ms in mine)} = {number(sum(mine))}"
        faster = f" ({number(stock / sum(mine), TIMES)})" if stock else ""
        return text if system == "eager" else text + faster

    def floor(scenario: str) -> str:
        """The best of all systems: the files and the weights are the same."""
        found = [
            [ms for s in systems if (ms := rows.value(scenario, s, field)) is not None]
            for field in ("read_ms", "floor_ms")
        ]
        return " + ".join(number(min(times)) for times in found if times) or NONE

    lines = [[_switch(s), *(cell(s, system) for system in systems), floor(s)] for s in scenarios]
    return [*table(["ms a switch", *systems, "floor"], lines), *errors(rows, scenarios)]


def switched(rows: Selection, scenarios: Sequence[str], systems: Sequence[str]) -> list[str]:
    """What a switch leaves behind, of what was measured."""

    def captures(scenario: str, system: str) -> str:
        fields = ("switch_graphs", "switch_captures", "switch_captures_dropped")
        counts = [rows.value(scenario, system, field) for field in fields]
        measured = any(count is not None for count in counts)
        return " / ".join(number(count, digits=0) for count in counts) if measured else NONE

    lines = [
        [
            _switch(scenario),
            system,
            _cell(rows, scenario, "worst_switch_ms", " ms")(system),
            _cell(rows, scenario, "step_ms", " ms")(system),
            _cell(rows, scenario, "switched_step_ms", " ms")(system),
            _cell(rows, scenario, "warm_first_image_s", " s")(system),
            _cell(rows, scenario, "switched_image_s", " s")(system),
            captures(scenario, system),
            _power(rows, scenario, "weights_rel_rms")(system),
            _latents(rows, scenario)(system),
        ]
        for scenario in scenarios
        for system in systems
        if rows.value(scenario, system, "switch_ms") is not None
    ]
    head = ["", "system", "slowest", "step before", "step after", "image before", "image after"]
    head += ["graphs / captures / dropped", "weights", "latents"]
    return ["", *table(head, lines)] if lines else []


def _switch(scenario: str) -> str:
    found = parse(scenario)
    kinds = {
        "switch": "another stack",
        "strength": "other strengths",
        "cold": "another stack, files not read before",
    }
    count = f"{found.loras} LoRA{'s' * (found.loras > 1)}"
    return f"{_MODELS[found.model]}, {count}, {kinds[found.kind]}"


def decodes(rows: Selection, scenarios: Sequence[str], systems: Sequence[str]) -> list[str]:
    """Times of a VAE decode."""
    fields = (
        *(("step_ms", " ms"), ("step_kernel_ms", " ms"), ("peak_vram_gib", " GiB")),
        *(("first_image_s", " s"), ("compile_s", " s")),
    )
    lines = []
    for scenario in scenarios:
        for system in systems:
            cells = [_cell(rows, scenario, field, unit)(system) for field, unit in fields]
            if rows.value(scenario, system, "step_ms") is None:
                cells[0] = missing(rows, scenario, system)
            lines.append([title(scenario), system, *cells, _latents(rows, scenario)(system)])
    head = ["", "system", "decode", "GPU busy", "tensors", "first", "compiling", "pixels"]
    return [*table(head, lines), *errors(rows, scenarios)]


def _by_system(rows: Selection, scenario: str, *columns: Column) -> list[str]:
    lines = []
    for system in rows.systems():
        name = f"**{system}**" if system == "blade" else system
        if rows.value(scenario, system, "step_ms") is None:
            cells = [missing(rows, scenario, system), *[NONE] * (len(columns) - 1)]
        else:
            cells = [cell(system) for _, cell in columns]
        lines.append([name, *cells])
    return [*table(["system", *(head for head, _ in columns)], lines), *errors(rows, [scenario])]


def _cell(
    rows: Selection, scenario: str, field: str, unit: str = "", digits: int | None = None
) -> Callable[[str], str]:
    return lambda system: number(rows.value(scenario, system, field), unit, digits)


def _image(rows: Selection, scenario: str) -> Callable[[str], str]:
    """Seconds of a whole run; older rows have the second run's only."""

    def cell(system: str) -> str:
        median = rows.value(scenario, system, "image_s")
        second = rows.value(scenario, system, "warm_first_image_s")
        return number(second if median is None else median, " s")

    return cell


def _first(rows: Selection, scenario: str) -> Callable[[str], str]:
    """Seconds of the first run, where nothing of it was compiled before."""

    def cell(system: str) -> str:
        cold = rows.value(scenario, system, "cold")
        value = rows.value(scenario, system, "first_image_s")
        return NONE if cold is False else number(value, " s")

    return cell


def _gap(rows: Selection, scenario: str) -> Callable[[str], str]:
    def cell(system: str) -> str:
        wall = rows.value(scenario, system, "step_ms")
        busy = rows.value(scenario, system, "step_kernel_ms")
        return NONE if wall is None or busy is None else number(max(0.0, wall - busy), " ms")

    return cell


def _latents(rows: Selection, scenario: str) -> Callable[[str], str]:
    power = _power(rows, scenario, "rel_rms")
    return lambda system: NONE if system == "eager" else power(system)


def _power(rows: Selection, scenario: str, field: str) -> Callable[[str], str]:
    def cell(system: str) -> str:
        value = rows.value(scenario, system, field)
        return NONE if value is None else f"{value:.1e}".replace("e-0", "e-")

    return cell


def _text(rows: Selection, scenario: str, field: str) -> Callable[[str], str]:
    def cell(system: str) -> str:
        row = rows.row(scenario, system)
        return str((row or {}).get(field) or NONE)

    return cell


def missing(rows: Selection, scenario: str, system: str) -> str:
    row = rows.row(scenario, system)
    return NOT_MEASURED if row is None or not row["error"] else "failed"


def errors(rows: Selection, scenarios: Sequence[str]) -> list[str]:
    """What failed and why, under the table."""
    failed = [row for row in rows.rows if row["error"] and row["scenario"] in scenarios]
    lines = [f"- {row['scenario']}, {row['system']}: `{row['error'][:200]}`" for row in failed]
    return ["", "Failed:", "", *lines] if lines else []


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]
