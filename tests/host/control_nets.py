"""Tiny real ControlNets of random weights: plain, Union, ControlLora, and a T2I-Adapter."""

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.t2i_adapter.adapter
import torch
from blade_tests.host.tiny import DEVICE

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.controlnet import apply_controlnet, optimize_controlnet

EAGER = OptimizeConfig(backend="eager", on_failure="error")

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
    if "num_classes" not in config:
        own["num_heads"] = 8  # as the host sets it for every SD1.5
    model = comfy.cldm.cldm.ControlNet(
        hint_channels=3,
        dtype=dtype,
        union_controlnet_num_control_type=kinds,
        operations=comfy.ops.disable_weight_init,
        **own,
    )
    fill(model.parameters(), seed, dtype)
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


def applied(
    control: Any,
    positive: Any,
    negative: Any,
    *,
    config: OptimizeConfig | None = EAGER,
    hint: torch.Tensor | None = None,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
) -> dict[str, Any]:
    """Both prompts with `control`: through Blade under `config`, or as stock without."""
    if config is not None:
        control = optimize_controlnet(control, config)
    hint = image() if hint is None else hint
    prompts = apply_controlnet(positive, negative, control, hint, strength, start, end)
    return dict(zip(("positive", "negative"), prompts, strict=True))
