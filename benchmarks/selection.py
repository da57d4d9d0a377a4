"""Which committed rows a table or plot shows: those of one run, so that they can be compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.rows import Row
from benchmarks.systems import SYSTEMS

PEERS = ("eager", "eager-fast", "torch-compile", "reduce-overhead")
MAIN = (*PEERS, "blade")
COMPARED = tuple(system for system in MAIN if system != "eager-fast")
"""Those that a run must have measured to be shown: `--fast` changes little of what stock takes."""


@dataclass(frozen=True)
class Selection:
    """The rows of one run for some scenarios; empty where nothing was measured."""

    rows: tuple[Row, ...] = ()

    def row(self, scenario: str, system: str) -> Row | None:
        """The last row of a scenario and system, failed or not."""
        found = [r for r in self.rows if (r["scenario"], r["system"]) == (scenario, system)]
        return found[-1] if found else None

    def value(self, scenario: str, system: str, field: str) -> float | None:
        """A figure, or None where the row is missing, failed or does not have it."""
        row = self.row(scenario, system)
        return None if row is None or row["error"] else row.get(field)

    def systems(self, wanted: Iterable[str] = MAIN) -> list[str]:
        """What is wanted, and whatever else was measured beside it; Blade last."""
        present = {*wanted, *(row["system"] for row in self.rows)}
        order = dict.fromkeys([*PEERS, *SYSTEMS, *sorted(present)])
        return sorted((name for name in order if name in present), key=lambda n: n == "blade")


def select(rows: Sequence[Row], scenarios: Sequence[str], systems: Sequence[str]) -> Selection:
    """The run that measured most of these scenarios with Blade, of those runs most scenarios, and
    of those most systems; the newest among equals."""
    runs: dict[str, list[Row]] = {}
    for row in rows:  # oldest first
        if row["scenario"] in scenarios and not row.get("dry_run"):
            runs.setdefault(row["run"], []).append(row)
    best, most = Selection(), (0, 1, 1)
    for found in runs.values():
        pairs = {(r["scenario"], r["system"]) for r in found if r["error"] is None}
        pairs = {pair for pair in pairs if pair[1] in systems}
        ours = sum(system == "blade" for _, system in pairs)
        count = ours, len({scenario for scenario, _ in pairs}), len(pairs)
        if count >= most:
            best, most = Selection(tuple(found)), count
    return best
