"""Runs the host's sampler on one model, with the conditioning of a scenario."""

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device import Marks, Trace, synchronize
from benchmarks.models import load_controlnet, unet_config
from benchmarks.scenarios import Scenario

_PROBE_STEPS = 8
"""Steps of a run that is not timed."""

_TRACED_RUN = 20
"""Steps of the run whose last steps are traced, at most."""

_TRACED_STEPS = 6


class Run:
    """One sampling run: latents, wall seconds, and ms between the ends of its steps."""

    def __init__(self, latents: torch.Tensor, seconds: float, step_ms: list[float]) -> None:
        self.latents, self.seconds, self.step_ms = latents, seconds, step_ms


class Conditioning:
    """Prompts of random numbers, with ControlNets of random weights behind them.

    made: what a system makes of a ControlNet before it is applied.
    """

    def __init__(
        self, scenario: Scenario, device: torch.device, made: Callable[[Any], Any]
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (1, scenario.tokens, unet_config(scenario.model)["context_dim"])
        self.positive, self.negative = (
            [
                [
                    torch.randn(shape, generator=generator),
                    {"pooled_output": torch.randn(1, 1280, generator=generator)},
                ]
            ]
            for _ in range(2)
        )
        for seed in range(scenario.controlnets):
            net = made(load_controlnet(scenario.model, device, seed))
            image = torch.rand(1, scenario.size, scenario.size, 3, generator=generator)
            self.positive, self.negative = _apply_node()(
                self.positive, self.negative, net, image, 1.0, 0.0, 1.0
            )


def _apply_node() -> Any:
    # The host's module, by name: to a type checker `nodes` is this pack's own folder.
    return importlib.import_module("nodes").ControlNetApplyAdvanced().apply_controlnet


class Runner:
    """Runs one model."""

    def __init__(
        self, model: Any, scenario: Scenario, conditioning: Conditioning, device: torch.device
    ) -> None:
        self.model, self.scenario, self.device = model, scenario, device
        self._conditioning = conditioning

    def __call__(
        self, steps: int | None = None, after_step: Callable[[int], None] | None = None
    ) -> Run:
        """Sample once; `after_step` gets the number of steps done."""
        import comfy.sample

        edge = self.scenario.edge
        latent = torch.zeros(self.scenario.batch, 4, edge, edge)
        marks = Marks(self.device)

        def mark(step: int, *_: Any) -> None:
            marks.add()
            if after_step is not None:
                after_step(step + 1)

        start = time.perf_counter()
        latents = comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(latent, 0),
            steps or self.scenario.steps,
            self.scenario.cfg,
            "euler",
            "normal",
            self._conditioning.positive,
            self._conditioning.negative,
            latent,
            callback=mark,
            disable_pbar=True,
            seed=0,
        )
        synchronize(self.device)
        return Run(latents, time.perf_counter() - start, marks.intervals_ms())

    def traced(self) -> dict[str, Any]:
        """What the profiler sees per step, of a run's last steps.

        A GPU that is at its limit of power takes its clock back within a few tenths of a second:
        the first steps of a run are faster than those that a user waits for.
        """
        steps = min(_TRACED_RUN, self.scenario.steps)
        first = max(2, steps - _TRACED_STEPS)
        with Trace(self.device) as trace:
            self(steps, lambda done: trace.mark() if done in (first, steps) else None)
        return trace.per_step(steps - first)

    def host_ms(self) -> float:
        """CPU ms of a step's model calls, each begun with the GPU idle; the median step's.

        The model's own method is wrapped, not its options: those are guarded by compiled graphs.
        """
        base = self.model.model
        original = base.apply_model
        per_step = [0.0]

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = original(*args, **kwargs)
            per_step[-1] += time.perf_counter() - start
            return result

        base.apply_model = timed
        try:
            self(min(_PROBE_STEPS, self.scenario.steps), lambda _: per_step.append(0.0))
        finally:
            del base.apply_model
        return round(statistics.median(per_step[2:-1]) * 1e3, 3)
