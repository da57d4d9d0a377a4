"""Blocks of a UNet or a ControlNet, called as the host calls them: with its patches in view."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
from torch import nn

from .block import OptimizedBlock
from .blocks import Layer, Step, count_transformers, program
from .patches import BlockId, Patched
from .unit import RunContext


class UNetBlock(OptimizedBlock):
    """One entry of input_blocks, middle_block or output_blocks."""

    def __init__(self, name: str, block_id: BlockId, block: nn.Module) -> None:
        super().__init__(name, block)
        self.block_id = block_id
        self.transformers = count_transformers(block)

    def _program(self) -> list[Step] | str:
        return program(self.block)

    def __call__(
        self,
        h: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None,
        options: dict[str, Any],
        output_shape: Any,
        video: tuple[Any, Any, Any],
        run: RunContext,
        patched: Patched,
    ) -> torch.Tensor:
        reason = patched.reason(self.block_id, self.block, attends=self.transformers > 0)
        if reason is None and context is None and self.transformers:
            reason = "there is no context"
        tensors = {"h": h, "emb": emb}
        if context is not None:
            tensors["context"] = context
        # Only height and width count (Upsample.forward); the rest would split the key.
        shape = None if output_shape is None else (0, 0, *output_shape[2:])
        result = self.attempt(tensors, {"output_shape": shape}, reason, run)
        if result is None:
            return forward_timestep_embed(
                self.block, h, emb, context, options, output_shape, *video
            )
        if self.transformers:
            # Patches of other blocks count on what the host's transformers leave behind.
            options["activations_shape"] = list(h.shape)
            if "transformer_index" in options:
                options["transformer_index"] += self.transformers
        return result


class OutBlock(OptimizedBlock):
    """The layers behind a UNet's blocks: GroupNorm, SiLU and a convolution."""

    def _program(self) -> list[Step] | str:
        kinds = [type(layer).__name__ for layer in self.block.children()]
        if type(self.block) is not nn.Sequential or kinds != ["GroupNorm", "SiLU", "Conv2d"]:
            return f"it is a {type(self.block).__name__} of {', '.join(kinds) or 'nothing'}"
        return [Step(" ".join(kinds), Layer(self.block), ("h",), "h")]

    def __call__(self, h: torch.Tensor, run: RunContext, patched: Patched) -> torch.Tensor:
        result = self.attempt({"h": h}, {}, patched.everything, run)
        if result is None:
            result = self.block(h)
        return result
