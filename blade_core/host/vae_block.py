"""One layer of an SD VAE as a block of one unit, called as the host calls it.

The host's own forward calls layer after layer, so each is a block: what cannot be compiled
costs that layer only, and what the host does between them stays its own.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules import model as host
from torch import nn

from .attention import unknown_call
from .block import OptimizedBlock
from .blocks import Layer, Step
from .unit import RunContext

_ATTENTIONS = (host.pytorch_attention, host.xformers_attention)
"""The host's attention functions that compute the same whatever else is going on. Its third asks
how much memory is free, which a traced graph would never ask again."""


class VAELayer(OptimizedBlock):
    """A ResnetBlock, AttnBlock, Upsample, Downsample, convolution or GroupNorm."""

    def _program(self) -> list[Step] | str:
        label = _label(self.block)
        if label is None:
            kind = type(self.block)
            return f"it is a {kind.__module__}.{kind.__name__}, which Blade does not know"
        if isinstance(self.block, host.AttnBlock):
            attention: Any = self.block.optimized_attention
            if attention not in _ATTENTIONS:
                name = getattr(attention, "__qualname__", type(attention).__name__)
                return (
                    f"its attention is {name}, which asks for free memory while it runs"
                    if attention is host.normal_attention
                    else f"its attention is {name}, which Blade does not know"
                )
            if (reason := unknown_call()) is not None:
                return reason
        return [Step(label, Layer(self.block), ("h",), "h")]

    def __call__(self, run: RunContext, h: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        """h: (B, C, H, W). `others` is what the layers of video VAEs take; None elsewhere."""
        extra = [value for value in (*others, *more.values()) if value is not None]
        reason = "the host passes more than an image" if extra else None
        result = self.attempt({"h": h}, {}, reason, run)
        if result is None:
            result = self.block(h, *others, **more)
        return result


def _label(layer: Any) -> str | None:
    kind = type(layer)
    if kind is host.ResnetBlock:
        return f"ResnetBlock {layer.in_channels}→{layer.out_channels}"
    if kind is host.AttnBlock:
        return f"AttnBlock {layer.in_channels}"
    if kind in (host.Upsample, host.Downsample):
        channels = f" {layer.conv.in_channels}" if layer.with_conv else ""
        return f"{kind.__name__}{channels}"
    if isinstance(layer, nn.Conv2d):
        return f"{kind.__name__} {layer.in_channels}→{layer.out_channels}"
    if isinstance(layer, nn.GroupNorm):
        return f"{kind.__name__} {layer.num_channels}"
    return None
