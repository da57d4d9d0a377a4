"""Patches keep their meaning: what they touch runs as stock, block by block, with a reason."""

import copy
from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy_extras.nodes_freelunch as freelunch
import pytest
import torch
from blade_tests.host.tiny import conditioning, relative_rms, sample
from comfy.ldm.modules.diffusionmodules import openaimodel

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.host.patches import UNPATCHED, read_patches

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
Patch = Callable[[Any], None]


def _shift(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any) -> Any:
    return q, k, v * 1.5


def _scale(out: torch.Tensor, _: Any) -> torch.Tensor:
    return out * 0.5


def _mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any) -> torch.Tensor:
    return q + v.mean(1, keepdim=True)[..., : q.shape[-1]]


def _override(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return function(*args, **kwargs) * 0.5


def _set_override(model: Any) -> None:
    model.model_options["transformer_options"]["optimized_attention_override"] = _override


# What is patched, how many of the ten blocks run eager, and the reason.
PATCHES: dict[str, tuple[Patch, int, str]] = {
    "attn1_patch": (lambda m: m.set_model_attn1_patch(_shift), 7, "attn1_patch is set"),
    "attn2_patch": (lambda m: m.set_model_attn2_patch(_shift), 7, "attn2_patch is set"),
    "attn1_output": (lambda m: m.set_model_attn1_output_patch(_scale), 7, "attn1_output_patch"),
    "attn2_output": (lambda m: m.set_model_attn2_output_patch(_scale), 7, "attn2_output_patch"),
    "replace one": (
        lambda m: m.set_model_attn1_replace(_mean, "output", 1),
        1,
        "attn1 is replaced by a patch",
    ),
    "replace one transformer": (
        lambda m: m.set_model_attn2_replace(_mean, "middle", 0, 0),
        1,
        "attn2 is replaced by a patch",
    ),
    "override": (_set_override, 7, "optimized_attention_override is set"),
    "layer": (
        lambda m: m.set_model_patch(
            (openaimodel.Downsample, lambda layer, x, *_: layer(x) * 2),
            "forward_timestep_embed_patch",
        ),
        1,
        "forward_timestep_embed_patch matches",
    ),
    "input block": (
        lambda m: m.set_model_input_block_patch(lambda h, _: h * 0.9),
        0,
        "",
    ),
    "unknown": (
        lambda m: m.set_model_patch(_scale, "brand_new_patch"),
        10,
        "does not know the patch 'brand_new_patch'",
    ),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_model_equals_stock(session: Session, sd15: Any, name: str) -> None:
    patch, eager, reason = PATCHES[name]
    patched = sd15.clone()
    patch(patched)
    expected = sample(patched)
    if name != "unknown":
        assert relative_rms(expected, sample(sd15)) > 1e-3  # the patch does something
    optimized = optimize_model(patched, EAGER)
    with session.engine.counters.expect(blocks_eager=eager, blocks_compiled=10 - eager):
        assert relative_rms(sample(optimized), expected) <= BOUND
    reasons = {r for m in session.stats()["models"] for b in m["blocks"] for r in b["reasons"]}
    assert all(reason in r for r in reasons) and bool(reasons) == bool(eager)


def test_freeu_runs_compiled(session: Session, sd15: Any) -> None:
    """FreeU works between the blocks, so that all of them stay compiled."""
    patch = freelunch.FreeU_V2()
    run = getattr(patch, "patch", None) or patch.execute
    # The tiny model's channels, which FreeU looks for by the size of the real one.
    sd15.model.model_config.unet_config["model_channels"] = 16
    patched = run(sd15, 1.3, 1.4, 0.9, 0.2)
    patched = patched[0] if isinstance(patched, tuple) else patched.result[0]
    expected = sample(patched)
    assert relative_rms(expected, sample(sd15)) > 1e-3
    with session.engine.counters.expect(blocks_eager=0):
        assert relative_rms(sample(optimize_model(patched, EAGER)), expected) <= BOUND


def test_conditioning_hooks_change_weights_within_a_step(session: Session, sd15: Any) -> None:
    """Hooks rewrite weights in place between the calls of one step; graphs must see that."""
    optimized = optimize_model(sd15, EAGER)
    sample(optimized, cfg=1.0)
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    weights = {
        key: ("diff", (torch.randn(weight.shape) * 0.1,))
        for key, weight in sd15.model.state_dict().items()
        if "to_v.weight" in key
    }
    for hook in hooks.hooks:
        hook.weights, hook.need_weight_init = weights, False
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    expected = sample(sd15, positive=positive)
    assert relative_rms(expected, sample(sd15)) > 0.01
    assert relative_rms(sample(optimized, positive=positive), expected) <= BOUND
    assert torch.equal(sample(sd15, positive=positive), expected)


def test_a_foreign_forward_on_a_layer_is_kept(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    attention = sd15.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    stock = attention.forward
    attention.forward = lambda *args, **kwargs: stock(*args, **kwargs) * 0.5
    expected = sample(sd15)
    with session.engine.counters.expect(blocks_eager=1, blocks_compiled=9):
        assert relative_rms(sample(optimized), expected) <= BOUND
    del attention.forward
    with session.engine.counters.expect(blocks_eager=0, graphs_compiled=0):
        sample(optimized)


def test_a_block_that_another_pack_replaces(session: Session, sd15: Any) -> None:
    """Object patches put another module into the container of blocks, for one clone."""
    optimized = optimize_model(sd15, EAGER)
    plain = sample(optimized)
    other = copy.deepcopy(sd15.model.diffusion_model.output_blocks[1])
    other[0].in_layers[2].weight.data.mul_(0.5)
    patched = sd15.clone()
    patched.add_object_patch("diffusion_model.output_blocks.1", other)
    expected = sample(patched)
    assert relative_rms(expected, sample(sd15)) > 1e-3
    assert relative_rms(sample(optimize_model(patched, EAGER)), expected) <= BOUND
    assert torch.equal(sample(optimized), plain)


def test_a_forward_hook_and_a_patched_class_are_kept(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized)
    layer = sd15.model.diffusion_model.input_blocks[1][0]
    handle = layer.register_forward_hook(lambda module, args, out: out * 0.5)
    expected = sample(sd15)
    with session.engine.counters.expect(blocks_eager=1):
        assert relative_rms(sample(optimized), expected) <= BOUND
    handle.remove()
    original = openaimodel.ResBlock._forward
    monkeypatch.setattr(
        openaimodel.ResBlock, "_forward", lambda self, x, emb: original(self, x, emb) * 0.9
    )
    expected = sample(sd15)
    assert relative_rms(sample(optimized), expected) <= BOUND


def test_a_replaced_host_function_means_stock(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized = optimize_model(sd15, EAGER)
    original = openaimodel.forward_timestep_embed
    monkeypatch.setattr(
        openaimodel, "forward_timestep_embed", lambda *a, **k: original(*a, **k) * 0.9
    )
    expected = sample(sd15)
    assert torch.equal(sample(optimized), expected)
    assert "replaced ComfyUI's forward_timestep_embed" in str(session.stats()["models"])


def test_no_patches_cost_nothing() -> None:
    assert read_patches({"patches": {}, "cond_or_uncond": [0, 1]}) is UNPATCHED
