"""The three kinds of measurement, each a function of a scenario that gives a row's fields."""

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import Memory, Trace, synchronize
from benchmarks.flops import tflop_per_step
from benchmarks.loaders import Stack
from benchmarks.loras import LoraFiles
from benchmarks.models import load_model, load_vae
from benchmarks.rows import Row
from benchmarks.sampling import Conditioning, Run, Runner
from benchmarks.scenarios import Scenario
from benchmarks.systems import System

_DECODES = 10
_READY_SECONDS = 180.0
"""After which blocks that run as stock are not waited for."""
_SWITCHES, _MOST_SWITCHES, _SWITCH_SECONDS = 3, 8, 5.0
"""Switches that are timed, and how many where so many seconds suffice for more."""


class Bench:
    """Measures scenarios with one system in this process."""

    def __init__(
        self, system: System, device: torch.device, shared: Path, *, is_reference: bool
    ) -> None:
        self.system, self.device = system, device
        self._references, self._is_reference = shared, is_reference
        self._files = LoraFiles(shared / "loras", device)
        self._used_before = Memory(device).before
        self._stock: dict[str, Any] = {}
        self._last_shape: tuple[Any, ...] | None = None
        if system.idle:
            _get_ready()

    def measure(self, scenario: Scenario) -> Row:
        """Return the fields of a scenario's row."""
        self._clear(scenario)
        memory = Memory(self.device, self._used_before)
        blade_before = _blade_counters()
        row: Row = {"cold": self._last_shape is None and not self.system.restart, "warnings": None}
        self._last_shape = scenario.shape
        if scenario.kind == "image":
            row |= self._images(scenario, memory)
        elif scenario.kind == "vae":
            row |= self._decodes(scenario, memory)
        else:
            row |= self._switches(scenario, memory)
        return row | _blade_fields(blade_before)

    def _clear(self, scenario: Scenario) -> None:
        """Leave nothing of the scenario before, except compiled graphs of the same shape."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        if self.system.dynamo and self._last_shape not in (None, scenario.shape):
            torch.compiler.reset()  # or Dynamo would make the next shape's graphs dynamic

    def _images(self, scenario: Scenario, memory: Memory) -> Row:
        graph = self._graph(scenario)
        model = graph(self._files.stack(scenario))
        run = Runner(model, scenario, self._conditioning(scenario), self.device)
        start, before = time.perf_counter(), _blade_counters()
        first = run()
        ready_s = _until_ready(run, start) if _counted(before).get("blocks_eager") else None
        warm = run()
        more = [run() for _ in range(3 if scenario.steps <= 20 else 2)]
        step_ms = _step_ms(more)
        row: Row = {
            "step_ms": round(statistics.median(step_ms), 3),
            "step_ms_p90": round(step_ms[int(0.9 * len(step_ms))], 3),
            "first_image_s": round(first.seconds, 3),
            "ready_s": ready_s,
            "warm_first_image_s": round(warm.seconds, 3),
            "image_s": round(statistics.median(one.seconds for one in (warm, *more)), 3),
            "steps": scenario.steps,
            "rel_rms": self._difference(scenario, warm.latents),
            **memory.peaks(),
        }
        if scenario.images_only:
            return row
        _also(row, lambda: {"tflop_per_step": tflop_per_step(scenario)})
        _also(row, lambda: {"host_ms": run.host_ms()})
        _also(row, run.traced)
        return _with_gap(row)

    def _decodes(self, scenario: Scenario, memory: Memory) -> Row:
        assert self.system.vae is not None
        vae = self.system.vae(load_vae(scenario.model, self.device))
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(scenario.batch, 4, scenario.edge, scenario.edge, generator=generator)

        def decode() -> tuple[torch.Tensor, float]:
            start = time.perf_counter()
            pixels = vae.decode(latent)
            synchronize(self.device)
            return pixels, time.perf_counter() - start

        _, first = decode()
        _, warm = decode()
        decoded = [decode() for _ in range(_DECODES)]
        times = sorted(seconds * 1e3 for _, seconds in decoded)
        pixels = decoded[-1][0]
        row: Row = {
            "step_ms": round(statistics.median(times), 3),
            "step_ms_p90": round(times[int(0.9 * len(times))], 3),
            "first_image_s": round(first, 3),
            "warm_first_image_s": round(warm, 3),
            "rel_rms": self._difference(scenario, pixels),
            **memory.peaks(),
        }

        def traced() -> Row:
            with Trace(self.device) as trace:
                decode()
                trace.mark()
                decode()
                trace.mark()
            return trace.per_step(1)

        _also(row, lambda: {"tflop_per_step": tflop_per_step(scenario)})
        _also(row, traced)
        return _with_gap(row)

    def _switches(self, scenario: Scenario, memory: Memory) -> Row:
        """Other LoRAs, or the same with other strengths, on a model in use."""
        import comfy.model_management

        conditioning = self._conditioning(scenario)
        turns = range(_MOST_SWITCHES + 2)
        in_use, *stacks, unused = (self._files.stack(scenario, turn) for turn in turns)
        graph = self._graph(scenario)
        if scenario.kind == "switch":
            graph(unused)  # reads the files of every other turn
        model = graph(in_use)
        first, warm = (Runner(model, scenario, conditioning, self.device)() for _ in range(2))
        blade_before = _blade_counters()
        switches, runs, image_s = [], [], []
        end = time.monotonic() + _SWITCH_SECONDS
        for stack in stacks:
            start = time.perf_counter()
            model = graph(stack)
            chained = time.perf_counter()
            comfy.model_management.load_models_gpu([model])
            synchronize(self.device)
            loaded = time.perf_counter()
            runs.append(Runner(model, scenario, conditioning, self.device)())
            image_s.append(time.perf_counter() - start)
            switches.append((loaded - start, chained - start))
            if len(runs) >= _SWITCHES and time.monotonic() > end:
                break
        counted = _counted(blade_before)
        switches.sort()
        total, nodes = (round(s * 1e3, 1) for s in switches[len(switches) // 2])
        row: Row = {
            "chain_ms": nodes,
            "switch_ms": round(total - nodes, 1),
            "total_switch_ms": total,
            "worst_switch_ms": round(switches[-1][0] * 1e3, 1),
            "switches": len(switches),
            "step_ms": round(statistics.median(_step_ms([warm])), 3),
            "switched_step_ms": round(statistics.median(_step_ms(runs)), 3),
            "switched_image_s": round(statistics.median(image_s), 3),
            "first_image_s": round(first.seconds, 3),
            "warm_first_image_s": round(warm.seconds, 3),
            "steps": scenario.steps,
            "rel_rms": self._difference(scenario, runs[_SWITCHES - 1].latents),
            **memory.peaks(),
        }
        if counted.get("runs"):
            row["switch_graphs"] = counted["graphs_compiled"]
            row["switch_captures"] = counted["captures"]
            row["switch_captures_dropped"] = counted["captures_dropped"]
        _also(row, lambda: self._files.check(model, scenario, stack))
        if scenario.kind == "cold":
            row["read_ms"] = self._files.read_ms(stack)
        return row

    def _conditioning(self, scenario: Scenario) -> Conditioning:
        return Conditioning(scenario, self.device, self.system.controlnet)

    def _graph(self, scenario: Scenario) -> Callable[[Stack], Any]:
        """A user's graph: from LoRAs to the model that is sampled."""
        name, loras = scenario.model, self.system.loras()
        if name not in self._stock:
            self._stock[name] = load_model(name, self.device)
        return lambda stack: self.system.apply(loras(self._stock[name], stack))

    def _difference(self, scenario: Scenario, result: torch.Tensor) -> float | None:
        """Relative RMS against the result of stock eager, which its own row has left."""
        file = self._references / f"{scenario.name}.pt"
        if self._is_reference:
            torch.save(result, file)
            return 0.0
        if not file.exists():
            return None
        expected = torch.load(file).double()
        error = (result.double() - expected).square().mean().sqrt()
        return float(f"{float(error / expected.square().mean().sqrt()):.3e}")


def _step_ms(runs: Iterable[Run]) -> list[float]:
    """Times of all steps but each run's first two, sorted."""
    return sorted(ms for run in runs for ms in run.step_ms[1:])


def _also(row: Row, measure: Callable[[], Row]) -> None:
    """Add what `measure` gives; that it fails must not cost what is measured already."""
    try:
        row |= measure()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        row["warnings"] = "; ".join(filter(None, [row.get("warnings"), text]))


def _with_gap(row: Row) -> Row:
    if row.get("step_kernel_ms") is None:
        return row
    return row | {"wall_minus_kernel_ms": round(row["step_ms"] - row["step_kernel_ms"], 3)}


def _get_ready() -> None:
    """What Blade does when a server has started, to its end."""
    from blade.blade_core.host.model import started

    started()
    for thread in threading.enumerate():
        if thread.name.startswith("blade-"):
            thread.join()


def _until_ready(run: Runner, start: float) -> float | None:
    """Sample until no block runs as stock any more; seconds since `start`."""
    while time.perf_counter() - start < _READY_SECONDS:
        before = _blade_counters()
        run()
        if not _counted(before)["blocks_eager"]:
            return round(time.perf_counter() - start, 3)
    return None


def _blade_counters() -> dict[str, float]:
    try:
        from blade.blade_core.host.model import stats
    except ImportError:  # a host that Blade does not run on: its peers do
        return {}
    return dict(stats()["counters"])


def _counted(before: dict[str, float]) -> dict[str, float]:
    """What the counters have moved by since."""
    return {key: value - before.get(key, 0) for key, value in _blade_counters().items()}


def _blade_fields(before: dict[str, float]) -> Row:
    """What Blade itself counted for this row; nothing where it did not run."""
    counted = _counted(before)
    decodes = bool(counted.get("vae_runs"))
    if not counted.get("runs") and not decodes:
        return {}
    from blade.blade_core.host.model import stats

    data = stats()
    models = data["vaes"] if decodes else [*data["models"], *data["controlnets"]]
    states = [block["state"] for model in models for block in model["blocks"]]
    row: Row = {
        "graphs": counted["graphs_compiled"],
        "compile_s": round(counted["compile_seconds"], 3),
        "graphs_loaded": counted["graphs_loaded"],
        "load_s": round(counted["load_seconds"], 3),
        "graph_mib": round(data["cache"]["bytes"] / 2**20, 1),
        "blocks_eager": sum(state != "compiled" for state in states),
    }
    if "capture_seconds" in counted:
        row["capture_ms"] = round(counted["capture_seconds"] * 1e3, 1)
    names = ("captures", "replays", "control_replays", "hint_embeddings")
    return row | {key: counted[key] for key in names if key in counted}
