"""The arithmetic in one step, counted on tensors without data: no GPU is touched."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import meta_controlnet, meta_unet, meta_vae, unet_config
from benchmarks.scenarios import Scenario


def tflop_per_step(scenario: Scenario) -> float:
    """TFLOP of matrix products, convolutions and attention: a step with CFG, or one decode."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if scenario.kind == "vae":
            latent = torch.empty(scenario.batch, 4, scenario.edge, scenario.edge)
            meta_vae(scenario.model).decode(latent)
        else:
            _step(scenario)
    return float(f"{counter.get_total_flops() / 1e12:.5g}")


def _step(scenario: Scenario) -> None:
    config = unet_config(scenario.model)
    batch = 2 * scenario.batch  # CFG: positive and negative prompt
    shared: dict[str, Any] = {
        "timesteps": torch.empty(batch),
        "context": _half(batch, scenario.tokens, config["context_dim"]),
    }
    if config["adm_in_channels"]:
        shared["y"] = _half(batch, config["adm_in_channels"])
    x = _half(batch, 4, scenario.edge, scenario.edge)
    meta_unet(scenario.model)(x, **shared, transformer_options={})
    hint = _half(batch, 3, scenario.size, scenario.size)
    for _ in range(scenario.controlnets):
        meta_controlnet(scenario.model)(x, hint, **shared)


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)
