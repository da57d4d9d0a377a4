"""Weights that are cast, patched on the fly, or folded in."""

import logging
from typing import Any

import pytest
import torch
from blade_tests.host.tiny import SD15, make_model, relative_rms, sample
from comfy.model_patcher import ModelPatcher
from torch import nn

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.errors import WeightsFrozen
from blade.blade_core.graph import skeleton
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.host.weights import HOST_STATE, ChannelsLast, UnitWeights, checksum

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
FROZEN = OptimizeConfig(backend="eager", freeze_weights=True, on_failure="error")
CPU = torch.device("cpu")


def _patched(model: Any, key: str, scale: float) -> Any:
    clone = model.clone()
    weight = model.model.state_dict()[key]
    clone.add_patches({key: ("diff", (torch.ones_like(weight) * scale,))})
    return clone


KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"


def test_weights_that_the_host_patches_on_the_fly(session: Session, sd15: Any) -> None:
    """A weight function is what lowvram leaves on a layer: resolved per call, by the host."""
    sample(optimize_model(sd15, EAGER))
    wrapped = sd15.clone()
    for name in ("middle_block.1.proj_in.weight", "output_blocks.0.0.out_layers.3.weight"):
        wrapped.add_weight_wrapper(f"diffusion_model.{name}", lambda weight: weight * 1.5)
    expected = sample(wrapped)
    assert relative_rms(expected, sample(sd15)) > 1e-3
    with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
        assert relative_rms(sample(optimize_model(wrapped, EAGER)), expected) <= BOUND
        sample(optimize_model(sd15, EAGER))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_in_another_dtype_than_the_computation(
    session: Session, dtype: torch.dtype
) -> None:
    """As fp16 files run on hardware without fp16, and fp8 files everywhere: cast in the graph."""
    import comfy.ops

    model = make_model(SD15)
    config = model.model.model_config
    config.set_inference_dtype(dtype, torch.float32)
    manual = config.get_model({})
    manual.diffusion_model.load_state_dict(model.model.diffusion_model.state_dict())
    model = ModelPatcher(manual, CPU, CPU)
    layer = manual.diffusion_model.input_blocks[0][0]
    assert isinstance(layer, comfy.ops.manual_cast.Conv2d) and layer.weight.dtype == dtype
    expected = sample(model)
    assert relative_rms(sample(optimize_model(model, EAGER)), expected) <= BOUND
    assert session.engine.counters["blocks_eager"] == 0


def test_a_tensor_subclass_runs_eager_by_block(session: Session, sd15: Any) -> None:
    class Quantized(nn.Parameter):
        pass

    layer = sd15.model.diffusion_model.middle_block[0].in_layers[2]
    layer.weight = Quantized(layer.weight.data, requires_grad=False)
    expected = sample(sd15)
    with session.engine.counters.expect(blocks_eager=1, blocks_compiled=9):
        assert relative_rms(sample(optimize_model(sd15, EAGER)), expected) <= BOUND
    assert "Quantized, not a plain tensor" in str(session.stats()["models"])


def test_frozen_weights_rebuild_loudly(
    session: Session, sd15: Any, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = optimize_model(sd15, FROZEN)
    expected = sample(sd15)
    assert relative_rms(sample(frozen), expected) <= BOUND
    with session.engine.counters.expect(graphs_compiled=0, frozen_rebuilds=0):
        sample(frozen, seed=4)
    graphs = len(session.engine.cache)
    with caplog.at_level(logging.WARNING, "blade"):
        changed = sample(optimize_model(_patched(sd15, KEY, 0.02), FROZEN))
    assert relative_rms(changed, sample(_patched(sd15, KEY, 0.02))) <= BOUND
    assert relative_rms(changed, expected) > 1e-3
    assert session.engine.counters["frozen_rebuilds"] == 1  # one unit holds the changed weight
    assert len(session.engine.cache) == graphs  # and its old graph is gone
    assert caplog.text.count("freeze_weights is on and the weights changed") == 1


def test_frozen_weights_can_refuse_a_change(session: Session, sd15: Any) -> None:
    config = OptimizeConfig("eager", freeze_weights=True, frozen_change="refuse")
    frozen = optimize_model(sd15, config)
    expected = sample(frozen)
    graphs = len(session.engine.cache)
    for _ in range(2):
        with pytest.raises(WeightsFrozen, match="frozen_change is refuse"):
            sample(_patched(frozen, KEY, 0.02))
    with session.engine.counters.expect(graphs_compiled=0, frozen_rebuilds=0):
        assert torch.equal(sample(frozen), expected)
    assert len(session.engine.cache) == graphs


def test_frozen_weights_do_not_hide_conditioning_hooks(session: Session, sd15: Any) -> None:
    import comfy.hooks
    from blade_tests.host.tiny import conditioning

    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    for hook in hooks.hooks:
        weight = sd15.model.state_dict()[KEY]
        hook.weights = {KEY: ("diff", (torch.ones_like(weight) * 0.05,))}
        hook.need_weight_init = False
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    expected = sample(sd15, positive=positive)
    assert relative_rms(expected, sample(sd15)) > 1e-3
    frozen = optimize_model(sd15, FROZEN)
    sample(frozen)
    assert relative_rms(sample(frozen, positive=positive), expected) <= BOUND


def test_channels_last_goes_back_to_where_it_was() -> None:
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    values, stride, address = conv.weight.clone(), conv.weight.stride(), conv.weight
    layout = ChannelsLast()
    layout.apply(list(conv.parameters()), CPU)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight is address and torch.equal(conv.weight, values)
    layout.restore()
    assert conv.weight.stride() == stride and torch.equal(conv.weight, values)


def test_a_checksum_sees_one_changed_bit() -> None:
    weights = [torch.randn(64, 64), torch.randn(7, dtype=torch.float64)]
    before = checksum(weights)
    assert checksum([w.clone() for w in weights]) == before
    weights[0][3, 5] = torch.nextafter(weights[0][3, 5], torch.tensor(9.0))
    assert checksum(weights) != before


def test_names_are_those_of_the_skeleton(sd15: Any) -> None:
    block = sd15.model.diffusion_model.output_blocks[1]
    weights = UnitWeights(block)
    bare = skeleton(block, drop=tuple(HOST_STATE))
    assert weights.names == [name for name, _ in bare.named_parameters()]
    assert all(parameter.is_meta for parameter in bare.parameters())
