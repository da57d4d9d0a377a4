"""The demo: runs stock and Blade workflows on a real server and compares time and result.

Run by `dev.py demo` inside the environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder's "server" and the checkout's "nodes" must not hide ComfyUI's.
    del sys.path[0]
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy
import requests
from safetensors.numpy import load

from devtools import WORK, DevError
from devtools.base_directory import make_base_directory, place_file
from devtools.client import ComfyClient, Event, PromptRejected, RunResult
from devtools.demo_report import write_report
from devtools.fixtures import make_fixtures
from devtools.host import default_host_path
from devtools.server import ComfyServer
from devtools.workflows import load_workflow

RUNS = 2
# Counter of the server to its heading.
COUNTERS = {
    "graphs_compiled": "compiled",
    "graphs_loaded": "loaded",
    "cache_hits": "cache hits",
    "blocks_eager": "blocks eager",
    "compile_failures": "failures",
}


@dataclass
class Subject:
    """One checkpoint to compare on."""

    architecture: str
    checkpoint: str
    width: int
    height: int


@dataclass
class Row:
    """What one workflow did in its runs."""

    name: str
    seconds: list[float] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    latents: list[numpy.ndarray] = field(default_factory=list)
    difference: float | None = None
    images: list[Path] = field(default_factory=list)
    report: str = ""
    stock: Row | None = None
    """What it is compared with."""

    def compare(self, stock: Row) -> None:
        """Note how far the latents are from those of the same seeds."""
        self.stock = stock
        pairs = zip(stock.latents, self.latents, strict=True)
        self.difference = max(relative_rms(a, b) for a, b in pairs)


class Progress:
    """Shows a run's progress in one line, and each new text of Blade in its own."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._live = sys.stdout.isatty()
        self._open = False

    def __call__(self, event: Event) -> None:
        """Take one event of the run."""
        if event.kind == "progress_text":
            self.close()
            print(f"  {self._label}: {event.data['text']}", flush=True)
        elif event.kind == "progress" and self._live:
            done, total = int(event.data["value"]), max(int(event.data["max"]), 1)
            bar = "#" * (24 * done // total)
            print(f"\r  {self._label} [{bar:<24}] {done}/{total}", end="", flush=True)
            self._open = True

    def close(self) -> None:
        """End an unfinished line."""
        if self._open:
            print()
            self._open = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except (DevError, PromptRejected, requests.RequestException) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    for name in ("--width", "--height", "--batch", "--steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("--backend", default="auto")
    return parser


def _demo(options: argparse.Namespace) -> int:
    import torch

    cuda = bool(torch.cuda.is_available())
    bound = 3e-3 if cuda else 1e-4
    steps = options.steps or (20 if cuda else 4)
    host = Path(os.environ.get("BLADE_COMFY") or default_host_path())
    folder = WORK / "demo"
    base = make_base_directory(folder / "base")
    subjects = _subjects(options, base, host, cuda)
    device = torch.cuda.get_device_name() if cuda else "the CPU"
    print(f"Starting ComfyUI on {device} (log: {WORK / 'logs' / 'demo.log'}) ...", flush=True)
    rows: list[Row] = []
    graphs = folder / "graphs"
    shutil.rmtree(graphs, ignore_errors=True)  # the first image is to show what compiling takes
    variables = {"BLADE_CACHE_DIR": str(graphs)}
    with ComfyServer(host, base, log=WORK / "logs" / "demo.log", variables=variables) as server:
        client = ComfyClient(server.url)
        for subject in subjects:
            rows += _compare(client, subject, options, steps, folder)
        stats = client.get_json("/blade/stats")
    print("Starting ComfyUI again, with the graphs that are on disk now ...", flush=True)
    log = WORK / "logs" / "demo-restarted.log"
    with ComfyServer(host, base, log=log, variables=variables) as server:
        client = ComfyClient(server.url)
        for subject in subjects:
            _warm_up(client, subject, options)
            row = Row(f"{subject.architecture} blade restarted")
            _measure(client, subject, "blade", row, options, steps, folder)
            stock = next(row for row in rows if row.name == f"{subject.architecture} stock")
            row.compare(stock)
            rows.append(row)
    backend = f"{_backends(stats)} (asked for: {options.backend})"
    table = _table_lines(rows)
    print(_aligned(table))
    print(f"\nBackend that ran: {backend}, on {device}.")
    for row in rows:
        if row.report:
            print(f"\n{row.name}:\n{row.report}")
    facts = {
        "Backend that ran": backend,
        "Device": device,
        "Steps": str(steps),
        "Batch": str(options.batch or 1),
        "Torch": torch.__version__,
        "Largest latent difference allowed": f"{bound:.0e} (relative RMS)",
    }
    report = write_report(folder / "report.html", table, rows, facts)
    print(f"Images: {folder}\nReport: {report}")
    differences = [row.difference for row in rows if row.difference is not None]
    if not all(value <= bound for value in differences):  # also false for NaN
        print(f"FAILED: latents differ from stock by more than {bound:.0e}.", file=sys.stderr)
        return 1
    return 0


def _subjects(options: argparse.Namespace, base: Path, host: Path, cuda: bool) -> list[Subject]:
    """The checkpoints to run: the user's one, or random weights (in real size on a GPU)."""
    sizes = {"sd15": 512, "sdxl": 1024} if cuda else {"sd15": 256, "sdxl": 256}
    if options.checkpoint is None:
        files = make_fixtures(base, sizes, full=cuda, host=host)
    elif options.checkpoint.is_file():
        target = base / "models" / "checkpoints" / options.checkpoint.name
        place_file(options.checkpoint.resolve(), target)
        files = {"sd15": target}
    else:
        raise DevError(f"--checkpoint {options.checkpoint}: there is no such file.")
    return [
        Subject(name, file.name, options.width or sizes[name], options.height or sizes[name])
        for name, file in files.items()
    ]


def _compare(
    client: ComfyClient, subject: Subject, options: argparse.Namespace, steps: int, folder: Path
) -> list[Row]:
    """Run the stock and the Blade workflow on one checkpoint."""
    size = f"{subject.width}x{subject.height}"
    print(f"{subject.checkpoint}, {size}, {steps} steps:", flush=True)
    _warm_up(client, subject, options)
    stock, blade = (Row(f"{subject.architecture} {kind}") for kind in ("stock", "blade"))
    _measure(client, subject, "stock", stock, options, steps, folder)
    _measure(client, subject, "blade", blade, options, steps, folder)
    blade.compare(stock)
    return [stock, blade]


def _warm_up(client: ComfyClient, subject: Subject, options: argparse.Namespace) -> None:
    """Read the file into the system's cache: else the first measured run alone would pay for it."""
    _run(client, _workflow(subject, "stock", options, steps=1), "warm-up")


def _measure(
    client: ComfyClient,
    subject: Subject,
    kind: str,
    row: Row,
    options: argparse.Namespace,
    steps: int,
    folder: Path,
) -> None:
    """Run one workflow of a checkpoint several times and fill in its row."""
    # All begin without loaded models, so that their first runs mean the same.
    client.free()
    time.sleep(1.0)
    before = _counters(client)
    for run in range(RUNS):
        # Each run has its own seed: the server would answer a repeated one from memory.
        workflow = _workflow(
            subject, kind, options, steps=steps, seed=1000 + run, backend=options.backend
        )
        result = _run(client, workflow, f"{row.name}, run {run + 1}")
        row.seconds.append(result.seconds)
        _keep_outputs(client, result, row, folder)
    after = _counters(client)
    row.counters = {key: after[key] - before[key] for key in COUNTERS}


def _workflow(
    subject: Subject, kind: str, options: argparse.Namespace, **changes: Any
) -> dict[str, Any]:
    return load_workflow(
        f"{subject.architecture}-txt2img-{kind}",
        checkpoint=subject.checkpoint,
        width=subject.width,
        height=subject.height,
        batch=options.batch,
        **changes,
    )


def _run(client: ComfyClient, workflow: dict[str, Any], label: str) -> RunResult:
    progress = Progress(label)
    result = client.run(workflow, on_event=progress)
    progress.close()
    if not result.ok:
        cause = (result.error or {}).get("exception_message", "no message")
        raise DevError(f"{label} ended with {result.status}: {cause}\nSee the server's log.")
    print(f"  {label}: {result.seconds:.2f} s", flush=True)
    return result


def _keep_outputs(client: ComfyClient, result: RunResult, row: Row, folder: Path) -> None:
    for place in result.files("latents"):
        row.latents.append(load(client.view(**place))["latent_tensor"].astype("float64"))
    for place in result.files("images"):
        number = len(row.images) + 1
        file = folder / f"{row.name.replace(' ', '-')}-{number}.png"
        file.write_bytes(client.view(**place))
        row.images.append(file)
    texts = [text for out in result.outputs.values() for text in out.get("text", [])]
    row.report = "\n".join(texts) or row.report


def relative_rms(reference: numpy.ndarray, other: numpy.ndarray) -> float:
    """The size of the difference relative to the reference; NaN stays NaN."""
    return float(numpy.sqrt(numpy.mean((other - reference) ** 2) / numpy.mean(reference**2)))


def _counters(client: ComfyClient) -> dict[str, int]:
    counters = client.get_json("/blade/stats")["counters"]
    return {key: int(counters[key]) for key in COUNTERS}


def _backends(stats: dict[str, Any]) -> str:
    """The compilers that ran, as the server tells them for each model."""
    names = {name for model in stats["models"] for name in model["compilers"][:1]}
    return ", ".join(sorted(names)) or "none"


def _head() -> list[str]:
    runs = [f"run {number + 1} (s)" for number in range(RUNS)]
    return ["workflow", *runs, *COUNTERS.values(), "latent difference"]


def _table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, its head first."""
    lines = [_head()]
    for row in rows:
        difference = "-" if row.difference is None else f"{row.difference:.1e}"
        seconds = [f"{value:.2f}" for value in row.seconds]
        counts = [str(row.counters[key]) for key in COUNTERS]
        lines.append([row.name, *seconds, *counts, difference])
    return lines


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n" + "\n".join("  ".join(line).rstrip() for line in padded)


if __name__ == "__main__":
    sys.exit(main())
