"""Code of other packs in the middle of things: set in each run, within a run, inside of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host
import comfy.utils
import pytest
import torch
from blade_tests.host.control_nets import EAGER, applied, make_controlnet, prompts
from blade_tests.host.tiny import SD15, relative_rms, sample
from comfy.patcher_extension import CallbacksMP

from blade.blade_core.host import attention
from blade.blade_core.host.model import Session, optimize_model

INNER = "diffusion_model.middle_block.1.transformer_blocks.0"


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_others", {})


def with_attention(model: Any, make: Callable[[Any], Any]) -> Any:
    """`model` with another attention function for the length of each run, made anew in each."""
    stock, model = host.optimized_attention, model.clone()

    def begin(_: Any) -> None:
        host.optimized_attention = make(stock)

    def end(_: Any) -> None:
        host.optimized_attention = stock

    model.add_callback(CallbacksMP.ON_PRE_RUN, begin)
    model.add_callback(CallbacksMP.ON_CLEANUP, end)
    return model


def scaled(factor: Any) -> Callable[[Any], Any]:
    def make(stock: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, heads: int, **more: Any) -> torch.Tensor:
            result: torch.Tensor = stock(q, k, v, heads, **more)
            return result * float(factor)

        return attend

    return make


class Half:
    """A number, but nothing that Blade can describe."""

    def __float__(self) -> float:
        return 0.5


def test_an_attention_closure_that_is_made_anew_is_the_same(session: Session, sd15: Any) -> None:
    """As packs with SageAttention do it."""
    ours, counters = with_attention(optimize_model(sd15, EAGER), scaled(0.5)), session.engine
    expected = sample(with_attention(sd15, scaled(0.5)), steps=3)
    assert relative_rms(expected, sample(sd15, steps=3)) > 1e-3
    assert relative_rms(sample(ours, steps=3), expected) < 1e-4
    with counters.counters.expect(graphs_compiled=0):
        assert relative_rms(sample(ours, steps=3), expected) < 1e-4
    other = with_attention(optimize_model(sd15, EAGER), scaled(0.25))
    expected = sample(with_attention(sd15, scaled(0.25)), steps=3)
    assert relative_rms(sample(other, steps=3), expected) < 1e-4


def test_attention_that_is_another_each_time_runs_as_stock(session: Session, sd15: Any) -> None:
    """In the end: until then each is compiled, once."""
    ours, counters = with_attention(optimize_model(sd15, EAGER), scaled(Half())), session.engine
    expected = sample(with_attention(sd15, scaled(Half())), steps=3)
    for _ in range(5):  # the last compiles what has no attention
        assert relative_rms(sample(ours, steps=3), expected) < 1e-4
    for _ in range(2):
        with counters.counters.expect(graphs_compiled=0):
            assert relative_rms(sample(ours, steps=3), expected) < 1e-4
    blocks = session.stats(sd15.model.diffusion_model, EAGER)["models"][0]["blocks"]
    (reason,) = {reason for block in blocks for reason in block["reasons"]}
    assert reason.startswith("another node pack sets an attention function in each run")
    assert {block["state"] for block in blocks} == {"compiled", "eager"}
    plain = sample(sd15, steps=3)  # gone, everything is compiled again
    assert relative_rms(sample(optimize_model(sd15, EAGER), steps=3), plain) < 1e-4


def counted(stock: Any) -> Any:
    calls = [0]

    def attend(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        return stock(*args, **more) * 0.5

    return attend


def cyclic(stock: Any) -> Any:
    held: dict[str, Any] = {}
    held["itself"] = held

    def attend(*args: Any, **more: Any) -> Any:
        return stock(*args, **more) * (0.5 if held else 1.0)

    return attend


def disabled(stock: Any) -> Any:
    """As KJNodes decorates its own."""
    return torch.compiler.disable()(scaled(0.5)(stock))


@pytest.mark.parametrize("make", [counted, cyclic, disabled, lambda stock: Bound(stock).attend])
def test_attention_that_stays_is_compiled_once(
    session: Session, sd15: Any, make: Callable[[Any], Any]
) -> None:
    once = make(host.optimized_attention)
    ours = with_attention(optimize_model(sd15, EAGER), lambda stock: once)
    expected = sample(with_attention(sd15, lambda stock: once), steps=3)
    assert relative_rms(sample(ours, steps=3), expected) < 1e-4
    for _ in range(2):
        with session.engine.counters.expect(graphs_compiled=0, blocks_eager=0):
            assert relative_rms(sample(ours, steps=3), expected) < 1e-4


class Bound:
    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def attend(self, *args: Any, **more: Any) -> Any:
        return self.stock(*args, **more) * 0.5


class Gain(host.CrossAttention):
    def forward(self, *args: Any, transformer_options: Any = None, **more: Any) -> Any:
        out = super().forward(*args, transformer_options=transformer_options or {}, **more)
        return out * (transformer_options or {}).get("gain", 1.0)


def test_a_part_that_goes_by_transformer_options(session: Session, sd15: Any) -> None:
    def patched(model: Any) -> Any:
        model = model.clone()
        part = Gain.__new__(Gain)
        part.__dict__.update(vars(model.get_model_object(f"{INNER}.attn1")))
        model.add_object_patch(f"{INNER}.attn1", part)
        model.model_options["transformer_options"]["gain"] = 0.2
        return model

    expected = sample(patched(sd15), steps=3)
    assert relative_rms(expected, sample(sd15, steps=3)) > 1e-3
    assert relative_rms(sample(patched(optimize_model(sd15, EAGER)), steps=3), expected) < 1e-4


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_code_that_is_set_from_the_third_step_on(session: Session, sd15: Any, how: str) -> None:
    def run(model: Any) -> torch.Tensor:
        part = comfy.utils.get_attr(sd15.model, f"{INNER}.attn2")
        calls: list[int] = []

        def wrapper(call: Any, given: dict[str, Any]) -> Any:
            calls.append(1)
            hook = None
            if len(calls) > 2 and how == "forward":
                part.forward = lambda *a, **k: type(part).forward(part, *a, **k) * 30.0
            elif len(calls) > 2:
                hook = part.register_forward_hook(lambda _, args, result: result * 30.0)
            try:
                return call(given["input"], given["timestep"], **given["c"])
            finally:
                vars(part).pop("forward", None)
                if hook is not None:
                    hook.remove()

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return sample(model, steps=5)

    expected = run(sd15)
    assert relative_rms(expected, sample(sd15, steps=5)) > 1e-3
    assert relative_rms(run(optimize_model(sd15, EAGER)), expected) < 1e-4


@pytest.mark.parametrize("blade_unet", [False, True])
def test_a_control_image_set_for_each_tile(
    session: Session, sd15: Any, blade_unet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI-TiledDiffusion does it: tiles of one shape, each with its part of the image."""

    def run(model: Any, config: Any) -> torch.Tensor:
        given = applied(make_controlnet(SD15), **prompts(), config=config)
        control = given["positive"][0][1]["control"]
        ask = type(control).get_control

        def tiles(call: Any, args: dict[str, Any]) -> torch.Tensor:
            x, t, c = args["input"], args["timestep"], dict(args["c"])
            c.pop("control", None)
            original = control.cond_hint_original
            size = (x.shape[-1] * 8, x.shape[-2] * 8)
            hint = comfy.utils.common_upscale(original, *size, "nearest-exact", "center")
            hint = hint.to(x.dtype).repeat(len(x), 1, 1, 1)
            parts = []
            for left in (0, 8):
                tile = x[..., left : left + 8]
                control.cond_hint = hint[..., left * 8 : left * 8 + 64]
                marks = len(args["cond_or_uncond"])
                found = ask(control, tile, t, c, marks, c["transformer_options"])
                parts.append(call(tile, t, **c, control=found))
            return torch.cat(parts, dim=-1)

        model = model.clone()
        model.set_model_unet_function_wrapper(tiles)
        with monkeypatch.context() as here:  # the pack keeps the host from asking itself
            here.setattr(type(control), "get_control", lambda *_: None)
            return sample(model, **given, steps=3)

    expected = run(sd15, None)
    model = optimize_model(sd15, EAGER) if blade_unet else sd15
    assert relative_rms(run(model, EAGER), expected) < 1e-4
