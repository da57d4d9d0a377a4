"""The rows that the benchmark writes: their fields, and how committed ones are read."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

MEASURED: dict[str, str] = {
    "step_ms": "wall ms of one step (vae: one decode), median",
    "step_ms_p90": "the same, 90th percentile",
    "step_kernel_ms": "ms of a step in which the GPU was busy, from the profiler",
    "wall_minus_kernel_ms": "step_ms - step_kernel_ms",
    "idle_ms": "ms of a step in which it was not, from the profiler, too: both at one clock rate",
    "host_ms": "CPU ms from entering a step's model calls to leaving them, the GPU idle before",
    "kernels_per_step": "kernels, copies and memsets on the GPU",
    "launches_per_step": "calls of the CUDA API that start them",
    "kinds_ms": "ms of a step that they took, by what they do (kinds.py); overlaps count twice",
    "first_image_s": "seconds of the process's first sampling run of this scenario",
    "ready_s": "seconds from its start until all graphs were there, where sampling did not wait",
    "cold": "whether nothing was compiled before that run, in memory or on disk",
    "warm_first_image_s": "seconds of the second run",
    "image_s": "median seconds of the second and all later runs",
    "steps": "sampling steps of a run",
    "capture_ms": "ms spent capturing CUDA graphs",
    "captures": "CUDA graphs captured",
    "replays": "replays of CUDA graphs",
    "control_replays": "ControlNet calls within them, or by themselves",
    "hint_embeddings": "control images that ControlNets took up",
    "chain_ms": "ms of the LoRA nodes and the system's own, in the switch of median length",
    "switch_ms": "ms after that until the model is loaded with the new weights",
    "total_switch_ms": "both: the median switch",
    "worst_switch_ms": "both: the slowest switch",
    "switches": "switches that were timed",
    "floor_ms": "ms to read and write touched_mib once at copy_gb_s",
    "touched_mib": "MiB of the weights that the LoRAs change",
    "read_ms": "ms to read the files of a stack once, where a switch has to",
    "switched_step_ms": "wall ms of one step after a switch, median; step_ms is before",
    "switched_image_s": "seconds from the first LoRA node to the end of the next image",
    "switch_graphs": "graphs compiled over all switches and their images",
    "switch_captures": "CUDA graphs captured in that time",
    "switch_captures_dropped": "CUDA graphs given back in that time",
    "weights_rel_rms": "relative RMS of the changed weights' difference from fp64 arithmetic",
    "peak_vram_gib": "most memory that tensors held",
    "peak_reserved_gib": "most memory that torch's allocator held",
    "peak_device_gib": "memory of the whole device in use after the runs, less that before",
    "allocator": "torch's CUDA allocator",
    "rel_rms": "relative RMS of the result's difference from that of system eager",
    "tflop_per_step": "matrix products, convolutions and attention of a step, counted",
    "peak_share": "tflop_per_step / step_kernel_ms as a share of matrix_peak_tflops",
    "graphs": "graphs compiled for this row",
    "compile_s": "seconds spent compiling them, of all processes together",
    "graphs_loaded": "graphs taken from disk instead",
    "load_s": "seconds spent loading them",
    "graph_mib": "MiB that all graphs hold",
    "blocks_eager": "blocks that ran as stock",
    "warnings": "what could not be measured, and why",
}
"""What a worker fills in; null where it does not apply."""

FROM_RUN = (
    "error",
    "run",
    "started",
    "dry_run",
    "gpu",
    "torch",
    "cuda",
    "triton",
    "python",
    "bytecode",
    "matrix_peak_tflops",
    "copy_gb_s",
    "comfyui",
    "commit",
    "command",
)
"""What run.py adds."""

REQUIRED = ("run", "scenario", "system", "error", "gpu", "torch", "comfyui", "commit", "command")
"""Fields of every row ever written."""


def empty(scenario: str, system: str) -> Row:
    """A row of which nothing is measured yet."""
    return {"scenario": scenario, "system": system, **dict.fromkeys(MEASURED), "error": None}


def with_peak_share(row: Row, matrix_peak: float | None) -> Row:
    """`row` with its share of the matrix rate measured on the same machine."""
    work, kernel_ms = row["tflop_per_step"], row["step_kernel_ms"]
    if not (work and kernel_ms and matrix_peak):
        return row
    return row | {"peak_share": round(work / (kernel_ms / 1e3) / matrix_peak, 4)}


def with_floor(row: Row, copy_gb_s: float | None) -> Row:
    """`row` with the least time that its switch could take on the same machine."""
    if not (row["touched_mib"] and copy_gb_s):
        return row
    return row | {"floor_ms": round(2 * row["touched_mib"] * 2**20 / copy_gb_s / 1e6, 3)}


def read(folder: Path = RESULTS) -> list[Row]:
    """All rows of a folder, oldest first; `file` and `date` tell where each was found."""
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line) | {"file": file.name, "date": file.name[:10]})
    return sorted(rows, key=lambda row: row.get("started") or row["date"])
