"""A UNet block as a short program of units, the parts that are compiled.

A unit is finer than a block, so that what repeats is compiled once: SDXL holds one
BasicTransformerBlock 70 times in two sizes. A block stays what is reported, and what runs
eager as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    SpatialTransformer,
)
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from torch import nn

from .attention import unknown_attention
from .projections import Projection, replaced, without_context, without_embedding


@dataclass(frozen=True)
class Step:
    """One unit in a block's program: `values[writes] = unit(*(values[name] for name in reads))`.

    The values are: h (B, C, H, W), emb (B, E), context (B, L, D), tokens (B, H*W, C), and
    output_shape, the shape of the skip connection that an Upsample has to meet. With a
    projection, the unit reads emb or context as that has projected it.
    """

    label: str
    unit: nn.Module
    reads: tuple[str, ...]
    writes: str
    projection: Projection | None = None

    def arguments(
        self,
        values: dict[str, Any],
        project: Callable[[Projection, torch.Tensor], torch.Tensor],
    ) -> list[Any]:
        """The unit's arguments; `project` gives what a projection makes of its input."""
        arguments = [values[name] for name in self.reads]
        if self.projection is not None:
            index = self.reads.index(self.projection.source)
            arguments[index] = project(self.projection, arguments[index])
        return arguments


def program(block: nn.Module) -> list[Step] | str:
    """Return the steps of `block`, or the reason why it can only run as stock."""
    if type(block) is not TimestepEmbedSequential:
        return f"the block is a {type(block).__name__}"
    steps: list[Step] = []
    for layer in block.children():
        kind = type(layer)
        if kind is ResBlock:
            label = f"ResBlock {layer.channels}→{layer.out_channels}"
            twin, projection = without_embedding(layer) or (layer, None)
            steps.append(Step(label, Layer(twin), ("h", "emb"), "h", projection))
        elif kind is SpatialTransformer:
            reason = unknown_attention() or _foreign_part(layer)
            if reason is not None:
                return reason
            steps += _transformer(layer)
        elif kind is Upsample:
            label = f"Upsample {layer.channels}"
            steps.append(Step(label, Layer(layer), ("h", "output_shape"), "h"))
        elif kind is Downsample or isinstance(layer, nn.Conv2d):
            label = f"{kind.__name__} {'→'.join(str(c) for c in _channels(layer))}"
            steps.append(Step(label, Layer(layer), ("h",), "h"))
        else:
            return _unknown(kind)
    return steps


def count_transformers(block: nn.Module) -> int:
    """How far a block moves the host's `transformer_index`."""
    return sum(isinstance(layer, SpatialTransformer) for layer in block.children())


def _foreign_part(layer: SpatialTransformer) -> str | None:
    """Why its parts may go by `transformer_options`, which never enter a graph."""
    for block in layer.transformer_blocks:
        if type(block) is not BasicTransformerBlock:
            return _unknown(type(block))
        for attention in (block.attn1, block.attn2):
            if attention is not None and type(attention) is not CrossAttention:
                return _unknown(type(attention))
    return None


def _unknown(kind: type) -> str:
    return f"it holds a {kind.__module__}.{kind.__name__}, which Blade does not know"


def _transformer(layer: SpatialTransformer) -> list[Step]:
    channels = layer.in_channels
    blocks = list(layer.transformer_blocks)
    if len(blocks) == 1:
        label = f"SpatialTransformer {channels}"
        parts, projection = without_context(blocks[0]) or ({}, None)
        twin = replaced(layer, {f"transformer_blocks.0.{k}": part for k, part in parts.items()})
        return [Step(label, Transformer(twin), ("h", "context"), "h", projection)]
    return [
        Step(f"SpatialTransformer {channels} in", TransformerIn(layer), ("h",), "tokens"),
        *(_stacked(f"BasicTransformerBlock {channels}", block) for block in blocks),
        Step(f"SpatialTransformer {channels} out", TransformerOut(layer), ("tokens", "h"), "h"),
    ]


def _stacked(label: str, block: nn.Module) -> Step:
    parts, projection = without_context(block) or ({}, None)
    twin = replaced(block, parts)
    return Step(label, Transformer(twin), ("tokens", "context"), "tokens", projection)


def _channels(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, Downsample):
        return (layer.channels,)
    return (layer.in_channels, layer.out_channels)


class Layer(nn.Module):
    """A layer that takes its arguments as they come."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> torch.Tensor:
        return self.layer(*args)


class Transformer(nn.Module):
    """A SpatialTransformer or BasicTransformerBlock with no patches.

    The host's `transformer_options` never enters a graph: a fresh dict also keeps the layer from
    writing into the default argument that all its kind share.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.layer(h, context, transformer_options={})


class TransformerIn(nn.Module):
    """What SpatialTransformer.forward does before its blocks.

    Source: ComfyUI comfy/ldm/modules/attention.py, SpatialTransformer.forward, the same from
    0.3.75 to 0.33.0; tests/host/test_blocks.py holds it against the host's own.
    """

    def __init__(self, layer: SpatialTransformer) -> None:
        super().__init__()
        self.norm = layer.norm
        self.proj_in = layer.proj_in
        self.use_linear = layer.use_linear

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(h)
        if not self.use_linear:
            tokens = self.proj_in(tokens)
        tokens = tokens.movedim(1, 3).flatten(1, 2).contiguous()
        return self.proj_in(tokens) if self.use_linear else tokens


class TransformerOut(nn.Module):
    """What SpatialTransformer.forward does after its blocks; `h` is what the layer was given."""

    def __init__(self, layer: SpatialTransformer) -> None:
        super().__init__()
        self.proj_out = layer.proj_out
        self.use_linear = layer.use_linear

    def forward(self, tokens: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        if self.use_linear:
            tokens = self.proj_out(tokens)
        batch, _, height, width = h.shape
        out = tokens.reshape(batch, height, width, tokens.shape[-1]).movedim(3, 1).contiguous()
        return h + out if self.use_linear else h + self.proj_out(out)
