"""LoRAs changed where the weights are: the host's values, at the same addresses."""

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.weight_adapter
import pytest
import torch
from blade_tests.host.tiny import SD15, make_model, relative_rms, sample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model, without_blade
from blade.blade_core.host.patcher import InPlacePatcher

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
KEYS = ("attn2.to_v.weight", "attn1.to_q.weight", "out_layers.3.weight", "out_layers.3.bias")


def with_loras(model: Any, *strengths: float) -> Any:
    """A LoRA for each strength, over weights of every kind; `model` may be optimized or not."""
    clone = model.clone()
    for number, strength in enumerate(strengths):
        generator = torch.Generator().manual_seed(number)
        patches = {}
        for key, weight in model.model.state_dict().items():
            if key.endswith(KEYS):
                noise = torch.randn(weight.shape, generator=generator) * 0.1
                patches[key] = ("diff", (noise,))
        clone.add_patches(patches, strength)
    return clone


def state(model: Any) -> dict[str, torch.Tensor]:
    return {key: weight.clone() for key, weight in model.model.state_dict().items()}


def addresses(model: Any) -> list[int]:
    return [weight.data_ptr() for weight in model.model.diffusion_model.parameters()]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("before", [True, False], ids=["LoRAs before", "LoRAs after"])
def test_loras_come_and_go_at_the_same_addresses(session: Session, sd15: Any, before: bool) -> None:
    base, stock = state(sd15), {}
    changes: list[tuple[float, ...]] = [(), (1.0,), (0.5,), (0.5, -0.7), (), (1.0,)]
    for strengths in changes:
        stock[strengths] = sample(with_loras(sd15, *strengths), steps=3)
    comfy.model_management.unload_all_models()
    assert equal(state(sd15), base)

    def blade(*strengths: float) -> Any:
        if before:
            return optimize_model(with_loras(sd15, *strengths), EAGER)
        return with_loras(optimize_model(sd15, EAGER), *strengths)

    sample(blade(), steps=3)
    sample(blade(1.0), steps=3)
    there = addresses(sd15)
    with session.engine.counters.expect(graphs_compiled=0, captures=0, captures_dropped=0):
        for strengths in changes:
            assert relative_rms(sample(blade(*strengths), steps=3), stock[strengths]) <= BOUND
            assert addresses(sd15) == there
    sample(blade(), steps=3)
    assert equal(state(sd15), base)


def test_values_do_not_depend_on_what_was_there_before(session: Session, sd15: Any) -> None:
    sample(with_loras(sd15, 0.3, 0.4))
    stock = state(sd15)
    optimized = optimize_model(sd15, EAGER)
    found = []
    for history in ([(0.3, 0.4)], [(1.0,), (), (0.3, 0.4)], [(2.0, -3.0, 1.0), (0.3, 0.4)]):
        comfy.model_management.unload_all_models()
        for strengths in history:
            sample(with_loras(optimized, *strengths))
        found.append(state(sd15))
    assert equal(found[0], found[1]) and equal(found[0], found[2])
    for key, weight in stock.items():
        assert relative_rms(found[0][key], weight) <= 1e-6, key


def _low_rank(up: tuple[int, ...], down: tuple[int, ...]) -> Any:
    factors = (torch.ones(up), torch.ones(down), None, None, None, None)
    return comfy.weight_adapter.LoRAAdapter(set(), factors)


REFUSED = {
    "a matrix for a convolution": ("proj_in.weight", ("diff", (torch.ones(32, 32),))),
    "a convolution for a matrix": ("attn1.to_q.weight", ("diff", (torch.ones(32, 32, 1, 1),))),
    "factors of other ranks": ("attn1.to_q.weight", _low_rank((32, 4), (1, 32))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_patches_that_the_host_refuses(session: Session, sd15: Any, what: str) -> None:
    """It says so and goes on without, whatever they could be broadcast to."""
    end, patch = REFUSED[what]
    key = next(key for key in state(sd15) if key.endswith(end))

    def patched(model: Any) -> Any:
        clone = with_loras(model, 0.5)
        clone.add_patches({key: patch})
        return clone

    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    sample(patched(optimized))
    ours = state(sd15)
    comfy.model_management.unload_all_models()
    sample(patched(sd15))
    assert torch.equal(ours[key], state(sd15)[key])


def test_stock_clones_in_between(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    models: list[Callable[[], Any]] = [
        lambda: sd15,
        lambda: with_loras(sd15, 0.8),
        lambda: with_loras(optimized, -0.4),
        lambda: optimized,
        lambda: with_loras(optimized, 0.8),
        lambda: with_loras(sd15, -0.4),
    ]
    expected: dict[int, torch.Tensor] = {}
    for turn in range(2):
        for number, model in enumerate(models):
            actual = sample(model(), steps=2)
            if turn == 0:
                expected[number] = actual
            assert relative_rms(actual, expected[number]) <= BOUND
    assert relative_rms(expected[0], expected[3]) <= BOUND
    assert relative_rms(expected[1], expected[4]) <= BOUND
    assert relative_rms(expected[2], expected[5]) <= BOUND
    assert relative_rms(expected[0], expected[1]) > 1e-3


def test_a_patch_that_fails_half_way(session: Session, sd15: Any, caplog: Any) -> None:
    """The stock way follows: its weights, or its error."""
    optimized = optimize_model(sd15, EAGER)
    sample(with_loras(optimized, 1.0))

    class Failing(comfy.weight_adapter.WeightAdapterBase):
        name = "failing"
        calls = 0

        def __init__(self) -> None:
            self.weights = ()

        def calculate_weight(self, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            Failing.calls += 1
            if Failing.calls == 2:
                raise RuntimeError("no memory for this patch")
            return weight.mul_(1.5)

    failing = optimized.clone()
    keys = [k for k in sd15.model.state_dict() if k.endswith("out_layers.3.weight")]
    failing.add_patches({key: Failing() for key in keys})
    sample(failing)
    patched = state(sd15)
    assert "Weights could not be changed in place" in caplog.text
    sample(sd15)
    base = state(sd15)
    for key, weight in patched.items():
        assert torch.equal(weight, base[key] * (1.5 if key in keys else 1.0)), key


def test_where_it_keeps_out(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    assert type(optimized) is InPlacePatcher and type(optimized.clone()) is InPlacePatcher
    assert type(sd15) is ModelPatcher and type(without_blade(optimized)) is ModelPatcher
    calls: list[Any] = []
    sample(optimized)
    listening = with_loras(optimized, 1.0)
    listening.add_callback_with_key(CallbacksMP.ON_LOAD, "other", lambda *args: calls.append(args))
    sample(listening)
    assert len(calls) == 1
    wrapped = sd15.clone()
    wrapped.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: weight * 1.5)
    expected = sample(wrapped)
    sample(with_loras(optimized, 1.0))
    assert relative_rms(sample(optimize_model(wrapped, EAGER)), expected) <= BOUND
    assert relative_rms(sample(optimized), sample(sd15)) <= BOUND


def test_weights_that_a_load_has_to_cast(session: Session) -> None:
    def forced(model: Any) -> Any:
        clone = model.clone()
        clone.set_model_compute_dtype(torch.float32)
        return clone

    expected = sample(forced(make_model(SD15, dtype=torch.bfloat16)))
    optimized = optimize_model(make_model(SD15, dtype=torch.bfloat16), EAGER)
    sample(optimized)
    assert relative_rms(sample(forced(optimized)), expected) <= BOUND


class Other(ModelPatcher):
    """A patcher of another pack, as GGUF's."""


def test_a_patcher_of_another_pack_stays_what_it_is(session: Session, sd15: Any) -> None:
    other = Other(sd15.model, sd15.load_device, sd15.offload_device)
    assert type(optimize_model(other, EAGER)) is Other
