"""UNets of the real shapes with random weights, through the host's real loader.

Speed does not depend on the values of weights; fidelity is judged against stock with the same.
"""

import math
from typing import Any

import torch

from devtools.fixture_weights import UNETS

_SHAPES = {
    **UNETS,
    "sd15-dry": UNETS["sd15"],
    "sdxl-dry": UNETS["sdxl"],
}


def load_model(name: str, device: torch.device, seed: int = 0) -> Any:
    """Return a ModelPatcher as the host's loader makes it from a UNet file, in fp16 on CUDA."""
    from comfy import ops, sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {k: list(v) if isinstance(v, list) else v for k, v in _SHAPES[name].items()}
    with torch.device("meta"):
        unet = UNetModel(**config, operations=ops.disable_weight_init, dtype=torch.float16)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {
        f"model.diffusion_model.{key}": _random(key, meta, generator)
        for key, meta in unet.state_dict().items()
    }
    model = sd.load_diffusion_model_state_dict(weights)
    assert model is not None, f"the host does not recognise the UNet {name}"
    return model


def _random(key: str, meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(meta.shape, generator=generator, device=generator.device)
    if meta.ndim > 1:  # the spread that torch's own layers start with
        values *= 1 / math.sqrt(3 * meta[0].numel())
    else:
        values = 0.02 * values + (1.0 if key.endswith("weight") else 0.0)
    return values.to(meta.dtype)
