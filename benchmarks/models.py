"""Models of the real shapes with random weights, through the host's real loaders.

Speed does not depend on the values of weights; fidelity is judged against stock with the same.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from devtools import fixture_weights

_RANK = 32
_LORA_STRENGTH = 0.05  # a LoRA's product has about a tenth of the weight's own spread


def unet_config(name: str) -> dict[str, Any]:
    """The configuration of a UNet, with lists that the host's constructors may consume."""
    config = fixture_weights.UNETS[name.removesuffix("-dry")]
    return {key: list(v) if isinstance(v, list) else v for key, v in config.items()}


def meta_unet(name: str) -> Any:
    """The UNet without weights."""
    from comfy import ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        return UNetModel(
            **unet_config(name), operations=ops.disable_weight_init, dtype=torch.float16
        )


def meta_controlnet(name: str) -> Any:
    """The ControlNet of that UNet without weights."""
    from comfy import ops
    from comfy.cldm.cldm import ControlNet

    config = unet_config(name)
    del config["out_channels"]
    with torch.device("meta"):
        return ControlNet(
            **config,
            hint_channels=3,
            operations=ops.disable_weight_init,
            dtype=torch.float16,
            device="meta",
        )


def meta_vae(name: str) -> Any:
    """The VAE without weights."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**_vae_config(name))


def _vae_config(name: str) -> dict[str, Any]:
    narrow = {"ch": 32, "num_res_blocks": 1} if name.endswith("-dry") else {}
    return {"ddconfig": fixture_weights._VAE | narrow, "embed_dim": 4}


def load_model(name: str, device: torch.device, seed: int = 0) -> Any:
    """Return a ModelPatcher as the host's loader makes it from a UNet file, in fp16 on CUDA."""
    from comfy import sd

    filled = unet_weights(name, device, seed)
    weights = {f"model.diffusion_model.{key}": weight for key, weight in filled}
    model = sd.load_diffusion_model_state_dict(weights)
    assert model is not None, f"the host does not recognise the UNet {name}"
    return model


def load_controlnet(name: str, device: torch.device, seed: int) -> Any:
    """Return a ControlNet as the host's loader makes it from a file of the original format."""
    from comfy import controlnet

    filled = _filled(meta_controlnet(name), device, 1000 + seed)
    weights = {f"control_model.{key}": weight for key, weight in filled}
    return controlnet.load_controlnet_state_dict(weights)


def load_vae(name: str, device: torch.device) -> Any:
    """Return a VAE as the host's loader makes it from a VAE file; small ones need their sizes."""
    from comfy import sd

    weights = dict(_filled(meta_vae(name), device, 0))
    small = name.endswith("-dry")
    return sd.VAE(sd=weights, config={"params": _vae_config(name)} if small else None)


def unet_weights(
    name: str, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """The UNet's weights with their names, as in its file, one after the other."""
    return _filled(meta_unet(name), device, seed)


def lora_targets(name: str) -> dict[str, str]:
    """Every attention, feed-forward and projection weight, and its key in kohya's LoRA files.

    A file has two tensors for each: 384 for SD1.5, 1,444 for SDXL.
    """
    from comfy.utils import unet_to_diffusers

    shapes = meta_unet(name).state_dict()
    # Sorted: the host makes this map from sets, whose order differs from process to process.
    return {
        own_name: "lora_unet_" + trainer_name.removesuffix(".weight").replace(".", "_")
        for trainer_name, own_name in sorted(unet_to_diffusers(unet_config(name)).items())
        if ".attentions." in trainer_name
        and ".norm" not in trainer_name
        and own_name in shapes
        and shapes[own_name].ndim >= 2
    }


def lora_tensors(name: str, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """What a LoRA file holds."""
    shapes = meta_unet(name).state_dict()
    generator = torch.Generator(device).manual_seed(2000 + seed)
    result: dict[str, torch.Tensor] = {}
    for own_name, key in lora_targets(name).items():
        rows, columns, *kernel = shapes[own_name].shape
        down = torch.randn(_RANK, columns, *kernel, generator=generator, device=device)
        up = torch.randn(rows, _RANK, *(1 for _ in kernel), generator=generator, device=device)
        down /= math.sqrt(columns)
        up *= _LORA_STRENGTH / math.sqrt(_RANK)
        result[f"{key}.lora_down.weight"] = down.cpu()
        result[f"{key}.lora_up.weight"] = up.cpu()
    return result


def _filled(module: Any, device: torch.device, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    for key, meta in module.state_dict().items():
        yield key, _random(key, meta, generator)


def _random(key: str, meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(meta.shape, generator=generator, device=generator.device)
    if meta.ndim > 1:  # the spread that torch's own layers start with
        values *= 1 / math.sqrt(3 * meta[0].numel())
    else:
        values = 0.02 * values + (1.0 if key.endswith("weight") else 0.0)
    return values.to(meta.dtype)
