"""PAI-Blade's published table, and ours in its shape."""

from collections.abc import Sequence

from benchmarks.scenarios import TABLE_COLUMNS, TABLE_STEPS
from benchmarks.selection import Selection
from benchmarks.tables import NONE, TIMES, errors, missing, number, table

# An A10, stable-diffusion-webui, SD1 at 512x512, batch 1, seconds
# of 20, 50 and 100 steps for each of TABLE_COLUMNS.
PUBLISHED = {
    "eager": ((2.03, 2.94, 2.75), (4.77, 7.17, 6.64), (9.45, 14.18, 13.13)),
    "xformers": ((1.57, 2.46, 2.14), (3.63, 5.86, 5.06), (7.10, 11.54, 9.90)),
    "PAI-Blade": ((1.15, 1.15, 1.62), (2.59, 2.59, 3.75), (4.96, 4.96, 7.35)),
}


def published(rows: Selection, scenario: str, systems: Sequence[str]) -> list[str]:
    """Seconds of an image in the shape of PAI-Blade's table, and ratios beside its own."""
    head = [f"{n}, {what}" for n in TABLE_STEPS for what in TABLE_COLUMNS.values()]
    names = [f"{scenario}-s{n}{suffix}" for n in TABLE_STEPS for suffix in TABLE_COLUMNS]

    def seconds(system: str) -> list[float | None]:
        whole = [rows.value(name, system, "image_s") for name in names]
        second = [rows.value(name, system, "warm_first_image_s") for name in names]
        return [w if w is not None else s for w, s in zip(whole, second, strict=True)]

    theirs = {name: [x for line in times for x in line] for name, times in PUBLISHED.items()}
    lines = [
        [f"published, A10: {name}", *(number(v, digits=2) for v in theirs[name])] for name in theirs
    ]
    for system in systems:
        cells = [
            missing(rows, name, system) if value is None else number(value, digits=2)
            for name, value in zip(names, seconds(system), strict=True)
        ]
        lines.append([system, *cells])
    ratios = [
        [f"published: {name} / PAI-Blade", *_ratios(theirs[name], theirs["PAI-Blade"])]
        for name in ("eager", "xformers")
    ]
    ratios += [
        [f"{system} / blade", *_ratios(seconds(system), seconds("blade"))]
        for system in systems
        if system != "blade"
    ]
    return [
        *table(["seconds", *head], lines),
        *errors(rows, names),
        "",
        *table(["times as fast", *head], ratios),
    ]


def _ratios(theirs: Sequence[float | None], own: Sequence[float | None]) -> list[str]:
    pairs = zip(theirs, own, strict=True)
    return [number(a / b, TIMES, 2) if a and b else NONE for a, b in pairs]
