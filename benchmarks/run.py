"""Run scenarios with systems, in processes of their own, and write their rows as JSON lines.

python benchmarks/run.py --comfy PATH --scenarios sd15-512-b1 --systems eager,blade
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.jobs import SHARE, Job, OutOfBudget, plan, rows_of
from benchmarks.rows import RESULTS, ROOT, Row, empty, with_floor, with_peak_share
from benchmarks.scenarios import FORMS, expand
from benchmarks.systems import SYSTEMS, find_system

DRY_RESULTS = ROOT / ".dev" / "bench"
_SYSTEMS = "eager,eager-fast,torch-compile,reduce-overhead,blade"


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker ends, too
    try:
        scenarios = expand(options.scenarios)
        systems = options.systems.split(",")
        for system in systems:
            find_system(system)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    end = time.monotonic() + options.budget
    # Making bytecode of torch's source at each start takes seconds: users' machines keep it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    common = _common(options)
    if common["gpu"] is None:
        print("bench: there is no CUDA GPU here; --dry-run tries everything on the CPU.")
        return 2
    folder = options.out or (DRY_RESULTS if options.dry_run else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{common['started'][:10]}-{_slug(common['gpu'])}-{options.what}.jsonl"
    jobs = plan(scenarios, systems, options.share)
    failures, missing = _run(options, jobs, common, file, end)
    print(f"rows in {file}")
    if missing:
        print(f"not run, the budget of {options.budget:.0f} s being spent: {', '.join(missing)}")
    return 1 if failures or missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"scenarios:\n{FORMS}\nsystems:\n{', '.join(SYSTEMS)}, each also with -fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--comfy", type=Path, required=True, help="the ComfyUI folder")
    parser.add_argument("--scenarios", default="main", help="names or groups, commas between")
    parser.add_argument("--systems", default=_SYSTEMS)
    parser.add_argument("--what", default="step", help="last part of the result file's name")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds for all; the rest is not run"
    )
    parser.add_argument(
        "--share",
        choices=SHARE,
        default="shape",
        help="what scenarios must have in common to be measured in one process",
    )
    parser.add_argument(
        "--allocator",
        choices=("stock", "async", "native"),
        default="stock",
        help="torch's CUDA allocator (default: what the host itself chooses)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    return parser


def _run(
    options: argparse.Namespace, jobs: list[Job], common: Row, file: Path, end: float
) -> tuple[int, list[str]]:
    """Write the jobs' rows; return how many failed, and what the time did not suffice for."""
    failures, missing = 0, []
    with tempfile.TemporaryDirectory() as shared:
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py")]
        command += ["--comfy", str(options.comfy), "--shared", shared]
        command += ["--allocator", options.allocator, *["--dry-run"] * options.dry_run]
        for job in jobs:
            left = [scenario.name for scenario in job.scenarios]
            try:
                for part in rows_of(job, command, options.timeout, end):
                    left.remove(part["scenario"])
                    row = empty(part["scenario"], job.system) | part | common
                    row["error"] = _without_paths(row["error"], options.comfy)
                    row = with_peak_share(row, common["matrix_peak_tflops"])
                    row = with_floor(row, common["copy_gb_s"])
                    with file.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
                    print(_line(row), flush=True)
                    failures += row["error"] is not None
            except OutOfBudget:
                missing += [f"{name} {job.system}" for name in left]
    return failures, missing


def _common(options: argparse.Namespace) -> Row:
    """What all rows of this invocation have in common."""
    command = [sys.executable, str(ROOT / "benchmarks" / "probe.py")]
    command += ["--cpu"] * options.dry_run
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    machine: dict[str, Any] = json.loads(done.stdout)
    if options.dry_run:
        machine["gpu"] = "CPU"
    version: dict[str, str] = {}
    exec((options.comfy / "comfyui_version.py").read_text(), version)
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "run": uuid.uuid4().hex[:12],
        "started": now.isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        **machine,
        "comfyui": version["__version__"],
        "commit": _commit(),
        "command": _command(sys.argv[1:]),
    }


def _command(arguments: list[str]) -> str:
    """The command as anyone may repeat it: without this machine's paths."""
    paths = ("--comfy", "--out")
    kept: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        after_name = bool(kept) and kept[-1] in paths
        kept.append(
            "PATH" if after_name else f"{name}=PATH" if value and name in paths else argument
        )
    # Set by `dev.py bench`, which passes its own arguments on.
    program = os.environ.get("BLADE_BENCH_PROGRAM", "benchmarks/run.py")
    return f"python {program} {shlex.join(kept)}"


def _without_paths(text: str | None, comfy: Path) -> str | None:
    if text is None:
        return None
    for path, name in ((comfy, "COMFY"), (ROOT, "BLADE"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text[:500]


def _commit() -> str | None:
    given = os.environ.get("BLADE_COMMIT")  # where the checkout travels without its .git
    if given:
        return given
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or None


def _slug(name: str) -> str:
    return name.lower().replace("nvidia ", "").replace(" ", "-")


_HEADLINES = (
    *("step_ms", "step_kernel_ms", "host_ms"),
    *("first_image_s", "warm_first_image_s", "image_s", "capture_ms"),
    *("chain_ms", "switch_ms", "total_switch_ms", "worst_switch_ms", "floor_ms"),
    *("switched_step_ms", "switched_image_s", "switch_graphs", "switch_captures"),
    *("switch_captures_dropped", "weights_rel_rms"),
    *("peak_vram_gib", "rel_rms", "peak_share", "graphs", "warnings"),
)


def _line(row: Row) -> str:
    name = f"{row['scenario']:22} {row['system']:16}"
    if row["error"]:
        return f"{name} ERROR {row['error']}"
    shown = [f"{key}={row[key]}" for key in _HEADLINES if row[key] is not None]
    return f"{name} {' '.join(shown)}"


if __name__ == "__main__":
    sys.exit(main())
