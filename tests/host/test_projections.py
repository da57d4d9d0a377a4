"""What leaves the blocks, with the kernel's semantics by torch's own operations on the CPU."""

import gc
import subprocess
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import pytest
import torch
from blade_tests.host.tiny import conditioning, relative_rms, sample
from comfy.patcher_extension import WrappersMP

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host import projections
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.kernels.grouped_linear import GroupedLinear, Linear, reference

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"

pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)


class OnCpu(GroupedLinear):
    """Skips while its input has not changed, and reads it as it lies in memory."""

    def __init__(
        self, like: torch.Tensor, layers: Sequence[Linear], *, silu: bool, skip_unchanged: bool
    ) -> None:
        self._layers = layers
        self._silu, self._skip = silu, skip_unchanged
        rows = like.numel() // like.shape[-1]
        columns = [weight.shape[0] for weight, _ in layers]
        with torch.inference_mode(False):
            self._x = torch.full(tuple(like.shape), float("nan"), dtype=like.dtype)
            self._flat = torch.zeros(rows * sum(columns), dtype=like.dtype)
        parts = self._flat.split([rows * n for n in columns])
        self.outputs = [p.view(*like.shape[:-1], n) for p, n in zip(parts, columns, strict=True)]

    def __call__(self, x: torch.Tensor) -> None:
        x = x.as_strided(x.shape, self._x.stride())
        changed = (x != self._x).any() if self._skip else torch.ones((), dtype=torch.bool)
        results = reference(x, self._layers, silu=self._silu)
        for output, result in zip(self.outputs, results, strict=True):
            output.copy_(torch.where(changed, result, output))
        self._x.copy_(x)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "usable", lambda x, layers: True)
    monkeypatch.setattr(projections, "GroupedLinear", OnCpu)


def with_lora(model: Any, strength: float) -> Any:
    clone = model.clone()
    weight = model.model.state_dict()[KEY]
    clone.add_patches({KEY: ("diff", (torch.ones_like(weight),))}, strength)
    return clone


def test_prompts_and_loras_in_turn(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    for strength, prompt in ((0.0, 1), (0.0, 3), (0.5, 3), (1.0, 3), (1.0, 1)):
        options = {"steps": 3, "positive": conditioning(seed=prompt)}
        expected = sample(with_lora(sd15, strength), **options)
        for _ in range(2):
            actual = sample(with_lora(optimized, strength), **options)
            assert relative_rms(actual, expected) <= BOUND
    assert session.engine.counters["replays"] > 0


def test_results_that_only_a_capture_keeps_are_not_stale(session: Session, sd15: Any) -> None:
    expected = sample(with_lora(sd15, 1.0), steps=4)
    comfy.model_management.unload_all_models()
    optimized = optimize_model(sd15, EAGER)
    sample(with_lora(optimized, 0.1), steps=4)
    sample(with_lora(optimized, 0.0), steps=4)
    for tokens in range(78, 98):  # more forms than groups are kept
        prompts = [conditioning(tokens=tokens, seed=seed) for seed in (1, 2)]
        sample(with_lora(optimized, 0.0), steps=1, positive=prompts[0], negative=prompts[1])
    with session.engine.counters.expect(captures=0, captures_dropped=0):
        sample(with_lora(optimized, 0.0), steps=4)
        actual = sample(with_lora(optimized, 1.0), steps=4)
    assert relative_rms(actual, expected) <= BOUND


def test_a_prompt_that_is_not_contiguous(session: Session, sd15: Any) -> None:
    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        changed = list(args)
        changed[3] = torch.cat([args[3], args[3].flip(1)], 1)[:, :77]
        return executor(*changed, **kwargs)

    wrapped = sd15.clone()
    wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    expected = sample(wrapped, steps=1)
    sample(optimize_model(sd15, EAGER), steps=1)
    assert relative_rms(sample(optimize_model(wrapped, EAGER), steps=1), expected) <= BOUND


def test_a_kernel_that_cannot_be_compiled(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any) -> None:
        raise subprocess.CalledProcessError(1, "gcc: Python.h: No such file")

    monkeypatch.setattr(OnCpu, "__call__", fail)
    assert relative_rms(sample(optimize_model(sd15, EAGER)), sample(sd15)) <= BOUND
    assert caplog.text.count("kernel cannot run here") == 1


def test_unloading_frees_the_results(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized, steps=3)
    (state,) = session.states(sd15.model.diffusion_model)
    kernels = [weakref.ref(kernel) for kernel in state._captures.projections._kernels]
    assert kernels
    comfy.model_management.unload_all_models()
    gc.collect()
    assert all(kernel() is None for kernel in kernels)
