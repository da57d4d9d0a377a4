"""Q, K and V weights of self-attention one behind the other: a graph's one product reads all three
(kernels/joint_linear.py).

They stay so for as long as they are on the device. Whoever else has a model sees the same weights,
with the same values, each of them for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from comfy.ldm.modules.attention import CrossAttention
from torch import nn

from ..kernels.joint_linear import as_one
from .weights import holders


def attentions(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those modules whose weights may belong together."""
    return [module for module in modules if type(module) is CrossAttention]


def join_weights(attentions: Iterable[nn.Module], device: torch.device) -> None:
    """Move the weights that belong together, where nobody else holds their memory.

    One group is there twice at a time. Nothing waits for the device.
    """
    for module in attentions:
        weights = _weights(module)
        if weights and as_one(weights) is None and _movable(weights, device):
            _move(weights)


def _weights(attention: Any) -> list[torch.Tensor]:
    """Of the three layers, if they read the same tokens and have no bias."""
    layers = [attention.to_q, attention.to_k, attention.to_v]
    if not all(isinstance(layer, nn.Linear) for layer in layers):  # another pack's
        return []
    weights = [layer._parameters.get("weight") for layer in layers]
    if any(w is None or layer.bias is not None for w, layer in zip(weights, layers, strict=True)):
        return []
    kinds = {(w.ndim, w.shape[-1], w.dtype, w.is_inference()) for w in weights}
    return weights if len(kinds) == 1 else []


def _movable(weights: list[torch.Tensor], device: torch.device) -> bool:
    return all(
        type(w) in (nn.Parameter, torch.Tensor)
        and w.device == device
        and w.is_floating_point()
        and w.is_contiguous()
        and holders(w) == 1
        for w in weights
    )


def _move(weights: list[torch.Tensor]) -> None:
    # A tensor of inference mode, as what the host loads in its worker, stays one; others, too.
    with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        parts = whole.split([weight.shape[0] for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part
