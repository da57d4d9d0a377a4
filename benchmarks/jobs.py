"""Worker processes: which scenarios share one, and the rows that it prints."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from benchmarks.rows import Row
from benchmarks.scenarios import Scenario
from benchmarks.systems import REFERENCE, find_system

SHARE = ("none", "shape", "model")
_MARK = "ROW "  # of worker.py, which is no module to import
_VARIABLES = {
    # Torch's own advice for profiling where CUDA graphs are used more than once in a process.
    "TEARDOWN_CUPTI": "0",
    "DISABLE_CUPTI_LAZY_REINIT": "1",
}


class OutOfBudget(Exception):
    """The time for the whole invocation is over."""


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    system: str
    scenarios: tuple[Scenario, ...]


def plan(scenarios: Sequence[Scenario], systems: Sequence[str], share: str) -> list[Job]:
    """The jobs in the order to run them: all systems of a group of scenarios beside each other,
    the one first that the others' results are compared with."""
    systems = sorted(systems, key=lambda name: name != REFERENCE)
    groups: dict[Any, list[Scenario]] = {}
    for scenario in scenarios:
        keys = {"none": scenario.name, "shape": scenario.shape, "model": scenario.model}
        groups.setdefault(keys[share], []).append(scenario)
    return [
        Job(system, fitting)
        for group in groups.values()
        for system in systems
        if (fitting := tuple(s for s in group if applies(s, system)))
    ]


def applies(scenario: Scenario, system: str) -> bool:
    """Whether a system changes what the scenario measures."""
    return scenario.kind != "vae" or find_system(system).vae is not None


def rows_of(job: Job, command: list[str], timeout: float, end: float) -> Iterator[Row]:
    """Run a worker and yield a row for each scenario as it comes, with an error where it failed.

    Each process has an Inductor cache of its own, so that its first image is cold; worker.py sees
    to Blade's.

    Raises:
        OutOfBudget: the monotonic clock passed `end`.
    """
    if time.monotonic() >= end:
        raise OutOfBudget
    left = [scenario.name for scenario in job.scenarios]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as log,
    ):
        variables = os.environ | _VARIABLES | {"TORCHINDUCTOR_CACHE_DIR": folder}
        command = [*command, "--system", job.system, "--scenarios", ",".join(left)]
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # so that its compile workers can be ended with it
        )
        try:
            for row in _printed(process, len(left), timeout, end):
                left.remove(row["scenario"])
                yield row
            error = ""
        except TimeoutError as late:
            error = str(late)
        finally:
            _stop(process)
        if left:
            error = error or _last_words(log)
            for name in left:
                yield {"scenario": name, "error": error}


def _printed(
    process: subprocess.Popen[str], count: int, timeout: float, end: float
) -> Iterator[Row]:
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while count:
        row_end = time.monotonic() + timeout
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(row_end, end) - time.monotonic()))
            except queue.Empty:
                if end <= row_end:
                    raise OutOfBudget from None
                raise TimeoutError(f"not done in {timeout:.0f} s") from None
            if line is None:
                return
            if line.startswith(_MARK):
                break
        count -= 1
        yield json.loads(line.removeprefix(_MARK))


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a worker, whose rows are in or which is late, with the processes that it started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["the process died without a word"])[-1]
