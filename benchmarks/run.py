"""Run scenarios with systems, one process each, and write their rows as JSON lines.

python benchmarks/run.py --comfy PATH --scenarios sd15-512-b1 --systems eager,blade
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_FIELDS = ("step_ms", "step_ms_p90", "step_kernel_ms", "first_image_s", "warm_first_image_s")
_LATER = ("capture_ms", "switch_ms", "peak_vram_gib", "rel_rms", "tflop_per_step", "graphs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfy", type=Path, required=True, help="the ComfyUI folder")
    parser.add_argument("--scenarios", default="sd15-512-b1,sdxl-1024-b1")
    parser.add_argument("--systems", default="eager,torch-compile,blade")
    parser.add_argument("--what", default="step", help="last part of the result file's name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args()
    common = _environment(options)
    file = options.out / f"{datetime.date.today()}-{_slug(common['gpu'])}-{options.what}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for scenario in options.scenarios.split(","):
            for system in options.systems.split(","):
                row = _row(options, scenario, system, Path(folder))
                failures += row["error"] is not None
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({**row, **common}) + "\n")
                print(_line(row), flush=True)
    print(f"rows in {file}")
    return 1 if failures else 0


def _row(options: argparse.Namespace, scenario: str, system: str, folder: Path) -> dict[str, Any]:
    """One measured row. Each has an Inductor cache of its own, so that the first image is cold."""
    row: dict[str, Any] = {"scenario": scenario, "system": system}
    row |= dict.fromkeys((*_FIELDS, *_LATER)) | {"error": None}
    command = [sys.executable, str(ROOT / "benchmarks" / "worker.py")]
    command += ["--comfy", str(options.comfy), "--scenario", scenario, "--system", system]
    command += ["--reference", str(folder / f"{scenario}.pt")]
    command += ["--dry-run"] if options.dry_run else []
    variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder)}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=options.timeout
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done in {options.timeout:.0f} s"}
    if done.returncode != 0:
        print(done.stderr[-4000:], file=sys.stderr, flush=True)
        return row | {"error": (done.stderr.strip().splitlines() or ["died"])[-1][:500]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    version: dict[str, str] = {}
    exec((options.comfy / "comfyui_version.py").read_text(), version)
    cuda = torch.cuda.is_available() and not options.dry_run
    return {
        "run": uuid.uuid4().hex[:12],
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "comfyui": version["__version__"],
        "commit": _commit(),
        "command": " ".join(["python", "benchmarks/run.py", *_arguments(sys.argv[1:])]),
    }


def _arguments(arguments: list[str]) -> list[str]:
    """The command line as anyone may repeat it: without this machine's paths."""
    before = ["", *arguments[:-1]]
    paths = ("--comfy", "--out")
    return ["PATH" if b in paths else a for b, a in zip(before, arguments, strict=True)]


def _commit() -> str | None:
    given = os.environ.get("BLADE_COMMIT")  # where the checkout travels without its .git
    if given:
        return given
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or None


def _slug(name: str) -> str:
    return name.lower().replace("nvidia ", "").replace(" ", "-")


def _line(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"{row['scenario']:14} {row['system']:16} ERROR {row['error']}"
    shown = {k: v for k, v in row.items() if v is not None and k not in ("scenario", "system")}
    return f"{row['scenario']:14} {row['system']:16} " + " ".join(
        f"{key}={value}" for key, value in shown.items()
    )


if __name__ == "__main__":
    sys.exit(main())
