"""A step as one capture, with a recorder that does on the CPU what a CUDA graph does."""

import random
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.ldm.modules.attention
import comfy.model_management
import pytest
import torch
from blade_tests.host.tiny import SD15, SDXL, conditioning, make_model, relative_rms, sample
from comfy.patcher_extension import WrappersMP

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session, optimize_model
from blade.blade_core.report import as_text

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"

pytestmark = pytest.mark.parametrize("session", ["captured"], indirect=True)


def report(session: Session) -> dict[str, Any]:
    (model,) = session.stats()["models"]
    return model


def with_lora(model: Any, key: str = KEY, scale: float = 0.05) -> Any:
    clone = model.clone()
    weight = model.model.state_dict()[key]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * scale
    clone.add_patches({key: ("diff", (noise,))})
    return clone


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_a_step_is_captured_at_its_second_call_and_kept_over_runs(
    session: Session, config: dict[str, Any]
) -> None:
    model = make_model(config)
    optimized = optimize_model(model, EAGER)
    counters = session.engine.counters
    with counters.expect(captures=1, replays=2, blocks_eager=0, blocks_compiled=10):
        assert relative_rms(sample(optimized, steps=4), sample(model, steps=4)) <= BOUND
    again: dict[str, Any] = {"steps": 4, "seed": 5, "positive": conditioning(seed=7)}
    with counters.expect(captures=0, replays=4, captures_dropped=0, blocks_compiled=10):
        actual = sample(optimized, **again)
    assert relative_rms(actual, sample(model, **again)) <= BOUND
    assert "CUDA graphs 1 (1 MiB), whole steps replayed in the last run 4" in as_text(
        session.stats()
    )


def test_each_form_of_call_has_its_own_capture(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    forms: list[dict[str, Any]] = [
        {},
        {"size": (24, 16)},
        {"batch": 2},
        {"cfg": 1.0},
        {"positive": conditioning(tokens=154)},
    ]
    for options in forms:
        with session.engine.counters.expect(captures=1):
            actual = sample(optimized, steps=3, **options)
        assert relative_rms(actual, sample(sd15, steps=3, **options)) <= BOUND
    with session.engine.counters.expect(captures=0, graphs_compiled=0, captures_dropped=0):
        for options in reversed(forms):
            actual = sample(optimized, steps=3, seed=2, **options)
            assert relative_rms(actual, sample(sd15, steps=3, seed=2, **options)) <= BOUND


def test_a_patch_between_the_blocks_cuts_the_step_into_blocks(session: Session, sd15: Any) -> None:
    sample(optimize_model(sd15, EAGER), steps=4)
    patched = sd15.clone()
    patched.set_model_output_block_patch(lambda h, skip, _: (h * 1.1, skip))
    expected = sample(patched, steps=4)
    assert relative_rms(expected, sample(sd15, steps=4)) > 1e-3
    with session.engine.counters.expect(captures=10, replays=0, captures_dropped=0):
        assert relative_rms(sample(optimize_model(patched, EAGER), steps=4), expected) <= BOUND
    assert report(session)["not_captured"] == ["output_block_patch is set"]
    with session.engine.counters.expect(captures=0, replays=4):
        assert relative_rms(sample(optimize_model(sd15, EAGER), steps=4), expected) > 1e-3


def test_what_a_patch_keeps_is_not_overwritten(session: Session, sd15: Any) -> None:
    kept: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []

    def keep(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        kept.append(h)
        copies.append(h.clone())
        return h

    patched = sd15.clone()
    patched.set_model_input_block_patch_after_skip(keep)
    sample(optimize_model(patched, EAGER), steps=5)
    assert session.engine.counters["captures"] == 10
    assert all(torch.equal(h, copy) for h, copy in zip(kept, copies, strict=True))


def test_a_wrapper_inside_the_call_is_not_skipped(session: Session, sd15: Any) -> None:
    sample(optimize_model(sd15, EAGER), steps=3)
    calls = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args[0].shape)
        return executor(*args, **kwargs) * 1.5

    wrapped = optimize_model(sd15, EAGER)
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    stock = sd15.clone()
    stock.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    assert relative_rms(sample(wrapped, steps=4), sample(stock, steps=4)) <= BOUND
    assert len(calls) == 8
    assert "another node's wrapper" in str(report(session)["not_captured"])


def test_a_replaced_forward_is_not_skipped(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized, steps=3)
    unet = sd15.model.diffusion_model
    own = unet._forward
    unet._forward = lambda *args, **kwargs: own(*args, **kwargs) * 0.5
    expected = sample(sd15, steps=4)
    assert relative_rms(sample(optimized, steps=4), expected) <= BOUND
    assert "replaced the UNet's forward" in str(report(session)["not_captured"])


def test_a_layer_outside_the_blocks_that_others_changed(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized, steps=3)
    layer = sd15.model.diffusion_model.time_embed[2]
    own = layer.forward
    layer.forward = lambda x: own(x) * 0.5
    expected = sample(sd15, steps=4)
    with session.engine.counters.expect(replays=0, captures=10):
        assert relative_rms(sample(optimized, steps=4), expected) <= BOUND
    assert "replaced forward" in str(report(session)["not_captured"])
    del layer.forward
    handle = layer.register_forward_hook(lambda module, args, out: out * 2)
    expected = sample(sd15, steps=4)
    with session.engine.counters.expect(replays=0):
        assert relative_rms(sample(optimized, steps=4), expected) <= BOUND
    handle.remove()


def _other_padding(layer: Any) -> None:
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _other_product(layer: Any) -> None:
    own = layer._conv_forward
    layer._conv_forward = lambda x, weight, bias: own(x, weight, bias) * 0.5


@pytest.mark.parametrize("change", [_other_padding, _other_product])
def test_a_layer_outside_the_blocks_that_is_not_as_it_was(
    session: Session, sd15: Any, change: Any
) -> None:
    optimized = optimize_model(sd15, EAGER)
    sample(optimized, steps=3)
    change(sd15.model.diffusion_model.out[2])
    assert relative_rms(sample(optimized, steps=3), sample(sd15, steps=3)) <= BOUND


def test_an_object_patch_outside_the_blocks(session: Session, sd15: Any) -> None:
    sample(optimize_model(sd15, EAGER), steps=3)
    patched = sd15.clone()
    patched.add_object_patch("diffusion_model.out.1", torch.nn.Identity())
    expected = sample(patched, steps=3)
    assert relative_rms(sample(optimize_model(patched, EAGER), steps=3), expected) <= BOUND
    assert relative_rms(sample(optimize_model(sd15, EAGER), steps=3), expected) > 1e-3


def test_attention_functions_that_differ_in_their_closure(
    session: Session, sd15: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = comfy.ldm.modules.attention.optimized_attention

    def make(scale: float) -> Any:
        def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            return own(*args, **kwargs) * scale

        return attention

    optimized = optimize_model(sd15, EAGER)
    for scale in (0.5, 2.0):
        for name in ("optimized_attention", "optimized_attention_masked"):
            monkeypatch.setattr(comfy.ldm.modules.attention, name, make(scale))
        assert relative_rms(sample(optimized, steps=3), sample(sd15, steps=3)) <= BOUND


def test_changed_weights_are_never_missed(session: Session) -> None:
    # Of 64 channels two share a group: a norm over one would undo what the embedding adds.
    sd15 = make_model(SD15 | {"model_channels": 64})
    optimized = optimize_model(sd15, EAGER)
    plain = sample(sd15, steps=3)
    assert relative_rms(sample(optimized, steps=3), plain) <= BOUND
    for key in (
        KEY,  # projected outside of the graphs
        "diffusion_model.input_blocks.1.0.emb_layers.1.weight",
        "diffusion_model.output_blocks.0.0.out_layers.3.weight",  # inside of one
        "diffusion_model.time_embed.0.weight",  # the host's own layer
    ):
        changed = with_lora(sd15, key, 0.3)
        expected = sample(changed, steps=3)
        assert relative_rms(expected, plain) > 1e-3
        assert relative_rms(sample(optimize_model(changed, EAGER), steps=3), expected) <= BOUND
    assert relative_rms(sample(optimized, steps=3), plain) <= BOUND
    assert torch.equal(sample(sd15, steps=3), plain)


def test_a_weight_that_moves_within_a_run_drops_the_capture(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    unet = sd15.model.diffusion_model
    sample(optimized, steps=3)

    def replace(h: torch.Tensor, *_: Any) -> None:
        unet.out[2].weight = torch.nn.Parameter(unet.out[2].weight * 1.5, requires_grad=False)

    calls = iter(range(100))

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 2:
            replace(args[0])
        return executor(*args, **kwargs)

    moving = optimized.clone()
    moving.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    original = unet.out[2].weight
    with session.engine.counters.expect(captures_dropped=1, captures=1):
        actual = sample(moving, steps=6)
    unet.out[2].weight = original
    calls = iter(range(100))
    stock = sd15.clone()
    stock.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    expected = sample(stock, steps=6)
    assert relative_rms(actual, expected) <= BOUND


def test_conditioning_hooks_change_weights_between_calls(session: Session, sd15: Any) -> None:
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    for hook in hooks.hooks:
        hook.weights = {KEY: ("diff", (torch.ones_like(sd15.model.state_dict()[KEY]) * 0.5,))}
        hook.need_weight_init = False
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(seed=1), hooks)
    expected = sample(sd15, steps=4, positive=positive)
    assert relative_rms(expected, sample(sd15, steps=4)) > 1e-3
    optimized = optimize_model(sd15, EAGER)
    for _ in range(2):
        assert relative_rms(sample(optimized, steps=4, positive=positive), expected) <= BOUND
    assert session.engine.counters["replays"] > 8


def _controlnet(width: int) -> Any:
    keys = ("use_temporal_attention", "out_channels", "transformer_depth_output")
    config = {k: v for k, v in SD15.items() if k not in keys}
    generator = torch.Generator().manual_seed(width)
    model = comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=torch.float32, **config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    device = torch.device("cpu")
    control = comfy.controlnet.ControlNet(model, load_device=device)
    return control.set_cond_hint(torch.rand(1, 3, 128, 128, generator=generator), 1.0, (0.0, 1.0))


def test_control_present_absent_and_switching_within_a_run(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    whole, half = _controlnet(1), _controlnet(1)
    half.timestep_percent_range = (0.0, 0.5)
    runs: list[tuple[Any, int]] = [(None, 1), (whole, 1), (half, 0), (None, 0)]
    seen = []
    for control, captures in runs:
        extra = {} if control is None else {"control": control, "control_apply_to_uncond": True}
        prompts = {
            "positive": conditioning(seed=1, **extra),
            "negative": conditioning(seed=2, **extra),
        }
        expected = sample(sd15, steps=6, **prompts)
        seen.append(expected)
        with session.engine.counters.expect(captures=captures, blocks_eager=0):
            assert relative_rms(sample(optimized, steps=6, **prompts), expected) <= BOUND
    assert relative_rms(seen[1], seen[0]) > 1e-3 and relative_rms(seen[2], seen[1]) > 1e-4


def test_a_cancel_between_replays(session: Session, sd15: Any) -> None:
    optimized = optimize_model(sd15, EAGER)
    expected = sample(optimized, steps=4)
    calls = iter(range(100))

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    cancelled = optimized.clone()
    cancelled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(cancelled, steps=4)
    with session.engine.counters.expect(captures=0, replays=4):
        assert torch.equal(sample(optimized, steps=4), expected)


def test_thirty_prompts_at_random(session: Session) -> None:
    """Sizes, batches, prompt lengths, cfg, LoRAs and two checkpoints in turn, in one life."""
    choose = random.Random(0)
    models = [make_model(SD15, seed=seed) for seed in (0, 1)]
    for number in range(30):
        model = choose.choice(models)
        if choose.random() < 0.5:
            model = with_lora(model, choose.choice([KEY, KEY.replace("attn2.to_v", "attn1.to_q")]))
        options: dict[str, Any] = {
            "size": choose.choice([(8, 8), (16, 8)]),
            "batch": choose.choice([1, 2]),
            "cfg": choose.choice([1.0, 7.0]),
            "positive": conditioning(tokens=choose.choice([77, 154]), seed=number),
            "seed": number,
            "steps": 3,
        }
        actual = sample(optimize_model(model, EAGER), **options)
        assert relative_rms(actual, sample(model, **options)) <= BOUND, options
    assert session.engine.counters["blocks_eager"] == 0
    assert session.engine.counters["replays"] >= 30
