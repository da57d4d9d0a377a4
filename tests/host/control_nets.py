"""Tiny real ControlNets of random weights, of every kind, and stock's way with them."""

import importlib
from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.t2i_adapter.adapter
import torch
from blade_tests.host.tiny import DEVICE, SD15, conditioning, relative_rms, sample

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import optimize_model
from blade.nodes.controlnet_apply import BladeControlNetApply

HOST_NODES: Any = importlib.import_module("nodes")  # the checkout has another folder `nodes`
BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
DEEP = SD15 | {"num_res_blocks": [2, 2], "transformer_depth": [1] * 4}
DEEP |= {"transformer_depth_output": [1] * 6}  # a T2I-Adapter counts on two blocks a level
Prompts = dict[str, Any]
"""The keywords positive and negative of `sample`."""

_NOT_OURS = ("use_temporal_attention", "out_channels", "transformer_depth_output")


def make_controlnet(
    config: dict[str, Any],
    seed: int = 0,
    *,
    kinds: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A CONTROL_NET for a UNet of `config`; with `kinds` a Union ControlNet."""
    own = {k: v for k, v in config.items() if k not in _NOT_OURS}
    # What the host sets for every SD1.5 and SDXL, whatever the configuration says.
    own |= {"num_head_channels": 64} if "num_classes" in config else {"num_heads": 8}
    model = comfy.cldm.cldm.ControlNet(
        hint_channels=3,
        dtype=dtype,
        union_controlnet_num_control_type=kinds,
        operations=comfy.ops.disable_weight_init,
        **own,
    )
    fill(model.parameters(), seed, dtype)
    model.input_hint_block[-1].weight.data *= 20  # so that another image is seen in the result
    return comfy.controlnet.ControlNet(model, load_device=DEVICE)


def fill(parameters: Any, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Random weights of the spread that torch's own layers start with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 50
        noise = torch.randn(parameter.shape, generator=generator) * (3 * fan_in) ** -0.5
        parameter.data = (noise + (parameter.ndim == 1)).to(dtype)


def make_control_lora(config: dict[str, Any], seed: int = 0, rank: int = 4) -> Any:
    """A ControlLora: factors for what the UNet has, too, whole weights for what it lacks."""
    model = make_controlnet(config, seed).control_model
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {"lora_controlnet": torch.ones(1)}
    for name, weight in model.state_dict().items():
        whole = name.startswith(("zero_convs", "middle_block_out", "input_hint_block"))
        if whole:
            weights[name] = weight
        elif name.endswith(".weight") and weight.ndim > 1:
            stem = name.removesuffix(".weight")
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            weights[f"{stem}.up"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
            weights[f"{stem}.down"] = down * down[0].numel() ** -0.5
    return comfy.controlnet.ControlLora(weights)


def make_t2i_adapter(channels: list[int], seed: int = 0) -> Any:
    model = comfy.t2i_adapter.adapter.Adapter(
        cin=3 * 64, channels=channels, nums_rb=1, ksize=1, sk=True, use_conv=False, xl=False
    )
    fill(model.parameters(), seed)
    return comfy.controlnet.T2IAdapter(model, 3, 8, "nearest-exact", device=DEVICE)


def image(seed: int = 0, size: tuple[int, int] = (128, 128), batch: int = 1) -> torch.Tensor:
    """A control image, (batch, height, width, 3)."""
    return torch.rand(batch, *size, 3, generator=torch.Generator().manual_seed(seed))


def prompts(tokens: int = 77, others: int = 77) -> Prompts:
    return {"positive": conditioning(tokens, seed=1), "negative": conditioning(others, seed=2)}


def applied(
    control: Any,
    positive: Any,
    negative: Any,
    *,
    config: OptimizeConfig | None = EAGER,
    hint: Any = None,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
) -> Prompts:
    """Both prompts with `control`: by Blade's node under `config`, or by the host's own."""
    hint = image() if hint is None else hint
    arguments = (positive, negative, control, hint, strength, start, end)
    if config is None:
        both = HOST_NODES.ControlNetApplyAdvanced().apply_controlnet(*arguments)
    else:
        dials = (config.backend, config.freeze_weights, config.on_failure)
        both = BladeControlNetApply().apply(*arguments, None, *dials)
    return dict(zip(("positive", "negative"), both, strict=True))


def assert_as_stock(
    model: Any,
    apply: Callable[[OptimizeConfig | None], Prompts],
    *incoming: Any,
    bound: float = BOUND,
    **options: Any,
) -> torch.Tensor:
    """Blade gives stock's image, whether the UNet is optimized or not; return that image.

    apply: the prompts, by Blade under a configuration or as stock under None.
    incoming: the CONTROL_NETs in them, which have to stay as they were.
    """
    before = [state_of(control) for control in incoming]
    expected = sample(model, **apply(None), **options)
    for each in (model, optimize_model(model, EAGER)):
        actual = sample(each, **apply(EAGER), **options)
        assert relative_rms(actual, expected) <= bound
        assert torch.equal(sample(model, **apply(None), **options), expected)
    for control, state in zip(incoming, before, strict=True):
        assert changes(state, state_of(control)) == []
    return expected


def state_of(control: Any) -> dict[tuple[str, Any], Any]:
    """What a CONTROL_NET holds, by attribute and place in it, and how its weights lie."""
    found: dict[tuple[str, Any], Any] = {}
    for name, value in vars(control).items():
        places = enumerate(value) if isinstance(value, list) else [("", value)]
        found |= {(name, k): v for k, v in (value.items() if isinstance(value, dict) else places)}
    model = getattr(control, "control_model", None)
    if model is not None:
        found |= {("module", name): child for name, child in model.named_modules()}
        found |= {
            ("weight", name): (weight.data_ptr(), weight.stride())
            for name, weight in model.named_parameters()
        }
    return found


def changes(before: dict[tuple[str, Any], Any], now: dict[tuple[str, Any], Any]) -> list[Any]:
    """Where two states of a CONTROL_NET differ."""

    def same(key: tuple[str, Any]) -> bool:
        one, other = before.get(key, before), now.get(key, now)
        return one is other or (not isinstance(one, torch.Tensor) and one == other)

    return [key for key in before | now if not same(key)]
