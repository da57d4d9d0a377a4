"""Measure one scenario with one system in a process of its own, so that compiling starts cold.

Started by run.py; prints one JSON row as its last line.
"""

import argparse
import itertools
import json
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--scenario", required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--reference", type=Path, required=True, help="latents of system eager")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    _import_host(options.comfy, cpu=options.dry_run)
    row = _measure(options)
    print(json.dumps(row))


def _import_host(host: Path, *, cpu: bool) -> None:
    """Import the host as its own main.py would, and the pack as `blade`."""
    sys.path[0] = str(host)
    sys.argv = ["main.py", *(["--cpu", "--use-pytorch-cross-attention"] if cpu else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    register = runpy.run_path(str(ROOT / "devtools" / "pack.py"))["register_package"]
    for name, folder in (("blade", "."), ("devtools", "devtools"), ("benchmarks", "benchmarks")):
        register(name, ROOT / folder)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.models import load_model
    from benchmarks.scenarios import DRY, SCENARIOS
    from benchmarks.systems import find_system

    scenario = (DRY if options.dry_run else SCENARIOS)[options.scenario]
    device = torch.device("cpu" if options.dry_run else "cuda")
    with torch.inference_mode():
        stock = load_model(scenario.model, device)
        model = find_system(options.system)(stock)
        run = Runner(model, scenario, device)
        first = run(scenario.steps)
        warm = run(scenario.steps)
        steps = [ms for _ in range(3) for ms in run(scenario.steps).step_ms[1:]]
        kernel_ms = run.kernel_ms_per_step()
        row = {
            "step_ms": round(statistics.median(steps), 3),
            "step_ms_p90": round(sorted(steps)[int(0.9 * len(steps))], 3),
            "step_kernel_ms": kernel_ms,
            "first_image_s": round(first.seconds, 2),
            "warm_first_image_s": round(warm.seconds, 2),
            "peak_vram_gib": _peak_vram(device),
            "rel_rms": _difference(options, warm.latents),
        }
        if options.system.startswith("blade"):
            from blade.blade_core.host.model import stats

            data = stats()
            states = [b["state"] for m in data["models"] for b in m["blocks"]]
            row["graphs"] = data["counters"]["graphs_compiled"]
            row["compile_s"] = data["counters"]["compile_seconds"]
            row["graph_mib"] = round(data["cache"]["bytes"] / 2**20, 1)
            row["blocks_eager"] = sum(s != "compiled" for s in states)
    return row


class Run:
    """One sampling run: latents, wall seconds, and ms between the ends of its steps."""

    def __init__(self, latents: Any, seconds: float, step_ms: list[float]) -> None:
        self.latents, self.seconds, self.step_ms = latents, seconds, step_ms


class Runner:
    """Runs the host's sampler on one model."""

    def __init__(self, model: Any, scenario: Any, device: Any) -> None:
        import torch

        self.model, self.scenario, self.device = model, scenario, device
        config = model.model.model_config.unet_config
        self.context, self.pooled = config["context_dim"], 1280
        generator = torch.Generator().manual_seed(1)
        shape = (1, scenario.tokens, self.context)
        self.positive, self.negative = (
            [
                [
                    torch.randn(shape, generator=generator),
                    {"pooled_output": torch.randn(1, self.pooled, generator=generator)},
                ]
            ]
            for _ in range(2)
        )

    def __call__(self, steps: int) -> Run:
        import comfy.sample
        import torch

        edge = self.scenario.size // 8
        latent = torch.zeros(self.scenario.batch, 4, edge, edge)
        marks: list[Any] = []

        def mark(*_: Any) -> None:
            if self.device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append(event)
            else:
                marks.append(time.perf_counter())

        start = time.perf_counter()
        latents = comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(latent, 0),
            steps,
            self.scenario.cfg,
            "euler",
            "normal",
            self.positive,
            self.negative,
            latent,
            callback=mark,
            disable_pbar=True,
            seed=0,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        pairs = list(itertools.pairwise(marks))
        if self.device.type == "cuda":
            return Run(latents, seconds, [a.elapsed_time(b) for a, b in pairs])
        return Run(latents, seconds, [(b - a) * 1e3 for a, b in pairs])

    def kernel_ms_per_step(self) -> float | None:
        """GPU-kernel time of a whole run over its steps, from the profiler; None on the CPU."""
        from torch.profiler import ProfilerActivity, profile

        if self.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self(self.scenario.steps)
        total = sum(event.self_device_time_total for event in profiler.key_averages())
        return round(total / 1e3 / self.scenario.steps, 3)


def _peak_vram(device: Any) -> float | None:
    import torch

    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def _difference(options: argparse.Namespace, latents: Any) -> float | None:
    """Relative RMS against the latents of stock eager, which are kept by its own row."""
    import torch

    if options.system == "eager":
        torch.save(latents, options.reference)
        return 0.0
    if not options.reference.exists():
        return None
    expected = torch.load(options.reference).double()
    error = (latents.double() - expected).square().mean().sqrt()
    return float(f"{float(error / expected.square().mean().sqrt()):.3e}")


if __name__ == "__main__":
    main()
