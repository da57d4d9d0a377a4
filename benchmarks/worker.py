"""Measure scenarios with one system in a process of its own. Started by run.py.

Prints one line of JSON behind `ROW ` for each scenario, as soon as it is done.
"""

import argparse
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "ROW "
_CPU = ["--cpu", "--use-pytorch-cross-attention"]
_ALLOCATORS = {"stock": [], "async": ["--cuda-malloc"], "native": ["--disable-cuda-malloc"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--scenarios", required=True, help="names, with commas between")
    parser.add_argument("--system", required=True)
    parser.add_argument("--shared", type=Path, required=True, help="folder of the run's workers")
    parser.add_argument("--allocator", default="stock")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    _register_packages()
    from benchmarks.scenarios import parse
    from benchmarks.systems import REFERENCE, find_system

    system = find_system(options.system)
    os.environ["BLADE_CACHE_DIR"] = str(_disk(options, system))
    arguments = _CPU if options.dry_run else _ALLOCATORS[_allocator(options, system)]
    _import_host(options.comfy, [*arguments, *system.arguments])
    import torch

    from benchmarks.measure import Bench

    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.dry_run:
        torch.set_num_threads(1)  # tiny models: threads would mostly wait for each other
    with torch.inference_mode():
        bench = Bench(system, device, options.shared, is_reference=options.system == REFERENCE)
        for name in options.scenarios.split(","):
            scenario = parse(name)
            if options.dry_run:
                scenario = scenario.tiny()
            try:
                row = bench.measure(scenario)
            except Exception as error:
                traceback.print_exc()
                row = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
            print(MARK + json.dumps({"scenario": name, **row}), flush=True)


def _disk(options: argparse.Namespace, system: Any) -> Path:
    """Where Blade keeps its graphs: nowhere twice, but for what stands for a restart."""
    lasting = options.system == "blade" or system.restart
    name = options.scenarios.split(",")[0] if lasting else str(os.getpid())
    folder: Path = options.shared / f"graphs-{name}"
    return folder


def _allocator(options: argparse.Namespace, system: Any) -> str:
    chosen = options.allocator
    return str(system.allocator if chosen == "stock" else chosen)


def _register_packages() -> None:
    register = runpy.run_path(str(ROOT / "devtools" / "pack.py"))["register_package"]
    for name, folder in (("blade", "."), ("devtools", "devtools"), ("benchmarks", "benchmarks")):
        register(name, ROOT / folder)


def _import_host(host: Path, arguments: list[str]) -> None:
    """Begin as the host's own main.py does: it picks the allocator before torch is imported."""
    sys.path[0] = str(host)
    sys.argv = ["main.py", *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import cuda_malloc  # noqa: F401


if __name__ == "__main__":
    main()
