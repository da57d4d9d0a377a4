"""A block's program of units computes what the host's own block does."""

from typing import Any

import pytest
import torch
from blade_tests.host.tiny import SD15, SDXL, make_model
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
from torch import nn

from blade.blade_core.host.blocks import program
from blade.blade_core.host.projections import Projection


def _run(block: nn.Module, values: dict[str, Any]) -> torch.Tensor:
    steps = program(block)
    assert not isinstance(steps, str), steps
    for step in steps:
        values[step.writes] = step.unit(*step.arguments(values, Projection.__call__))
    return values["h"]


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_every_block_equals_the_hosts_bit_for_bit(config: dict[str, Any]) -> None:
    unet = make_model(config).model.diffusion_model
    emb, context = torch.randn(2, 128), torch.randn(2, 77, 32)
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    for block in blocks:
        first = next(iter(block.children()))
        channels = getattr(first, "channels", None) or first.in_channels
        h = torch.randn(2, channels, 8, 8)
        with torch.inference_mode():
            expected = forward_timestep_embed(block, h, emb, context, {}, (2, 1, 15, 17))
            actual = _run(
                block,
                {"h": h, "emb": emb, "context": context, "output_shape": (0, 0, 15, 17)},
            )
        assert torch.equal(actual, expected)


def test_deep_transformers_are_split_and_shallow_ones_are_not() -> None:
    deep = program(make_model(SDXL).model.diffusion_model.middle_block)
    shallow = program(make_model(SD15).model.diffusion_model.middle_block)
    assert not isinstance(deep, str) and not isinstance(shallow, str)
    assert [step.label for step in deep] == [
        "ResBlock 64→64",
        "SpatialTransformer 64 in",
        "BasicTransformerBlock 64",
        "BasicTransformerBlock 64",
        "SpatialTransformer 64 out",
        "ResBlock 64→64",
    ]
    assert [step.label for step in shallow][1] == "SpatialTransformer 64"


def test_an_unknown_layer_is_named() -> None:
    block = make_model(SD15).model.diffusion_model.input_blocks[1]
    block.append(nn.Flatten())
    assert "Flatten, which Blade does not know" in str(program(block))
