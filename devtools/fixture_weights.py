"""Write one random-weight model file in the format the host loads.

Run by devtools/fixtures.py as its own process: `fixture_weights.py HOST NAME FILE`. Names and
shapes come from the host's own classes on the meta device, and its own "for saving" conversions
turn them into the keys of published checkpoints, so no table here can drift from the host.
"""

import math
import sys
import zlib
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The host's modules have names like this folder's own ("server"): only the host's may count.
    sys.path[0] = sys.argv[1]

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

_COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "transformer_depth_middle": 1,
    "use_temporal_attention": False,
}
_SD15 = _COMMON | {
    "context_dim": 768,
    "num_heads": 8,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
_SDXL = _COMMON | {
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    # The host tells SDXL by these depths, so the small one keeps them and has narrow stages.
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
_SMALL_SD15 = _SD15 | {
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": _SMALL_SD15,
    "sd15-b": _SMALL_SD15,
    "sd15-full": _SD15
    | {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": _SDXL | {"channel_mult": [1, 1, 1]},
    "sdxl-full": _SDXL | {"channel_mult": [1, 2, 4]},
}
_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
_LORA_RANK = 8


def shapes(module: torch.nn.Module, prefix: str = "") -> Tensors:
    """The parameters of a module built on the meta device."""
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def fill(name: str, meta: torch.Tensor, seed: str) -> torch.Tensor:
    """Values for one tensor, the same for the same name and seed whatever else is made.

    Nothing is zero: trained models start with zero output layers, which would hide whole paths.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    if name.endswith("logit_scale"):
        return torch.full(meta.shape, 4.6052, dtype=torch.float16)
    values = torch.randn(meta.shape, generator=generator)
    if "embedding" in name:
        values *= 0.02
    elif meta.ndim >= 2:
        values /= math.sqrt(math.prod(meta.shape[1:]))
    elif name.endswith("weight"):
        values = 1.0 + 0.1 * values
    else:
        values *= 0.02
    return values.to(torch.float16)


def checkpoint(name: str) -> Tensors:
    """A single-file checkpoint: UNet, VAE and text encoders."""
    from comfy import ops, sd1_clip, sdxl_clip, supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd.taesd import TAESD

    config = UNETS[name]
    sdxl = name.startswith("sdxl")
    family = (supported_models.SDXL if sdxl else supported_models.SD15)(dict(config))
    on_meta: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    clip_class = sdxl_clip.SDXLClipModel if sdxl else sd1_clip.SD1ClipModel
    with torch.device("meta"):
        unet = UNetModel(**_copied(config), operations=ops.disable_weight_init, **on_meta)
        clip = clip_class(**on_meta)
        # The loader fixes the sizes of the usual VAE; the only small one it takes is TAESD.
        vae = AutoencoderKL(ddconfig=_VAE, embed_dim=4) if name.endswith("-full") else TAESD()
    parts = [
        (shapes(unet), family.process_unet_state_dict_for_saving),
        (shapes(vae), family.process_vae_state_dict_for_saving),
        (shapes(clip), family.process_clip_state_dict_for_saving),
    ]
    result: Tensors = {}
    for tensors, for_saving in parts:
        filled = {key: fill(key, meta, name) for key, meta in tensors.items()}
        if "vae_scale" in filled:  # TAESD's constants, no weights
            filled["vae_scale"], filled["vae_shift"] = torch.tensor(1.0), torch.tensor(0.0)
        result |= for_saving(filled)
    return result


def vae() -> Tensors:
    """The usual VAE in a file of its own; the loader fixes its sizes."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(ddconfig=_VAE, embed_dim=4)
    return {key: fill(key, meta, "vae") for key, meta in shapes(model).items()}


def _copied(config: dict[str, Any]) -> dict[str, Any]:
    """The host's constructors consume their lists, so each gets its own."""
    return {key: list(v) if isinstance(v, list) else v for key, v in config.items()}


def lora() -> Tensors:
    """A LoRA over all attention weights of `sd15`, in the key format of kohya's trainer."""
    from comfy import ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.utils import unet_to_diffusers

    config = UNETS["sd15"]
    with torch.device("meta"):
        unet = UNetModel(**_copied(config), operations=ops.disable_weight_init, device="meta")
    weights = shapes(unet)
    result: Tensors = {}
    for trainer_name, name in unet_to_diffusers(_copied(config)).items():
        if ".attn" not in trainer_name or not trainer_name.endswith(".weight"):
            continue
        rows, columns = weights[name].shape
        key = "lora_unet_" + trainer_name.removesuffix(".weight").replace(".", "_")
        down = torch.empty(_LORA_RANK, columns, device="meta")
        up = torch.empty(rows, _LORA_RANK, device="meta")
        result[f"{key}.lora_down.weight"] = fill(f"{key}.down", down, "lora")
        # Strong enough to be seen in an image, weak enough to keep activations sane.
        result[f"{key}.lora_up.weight"] = 0.3 * fill(f"{key}.up", up, "lora")
        result[f"{key}.alpha"] = torch.tensor(float(_LORA_RANK), dtype=torch.float16)
    return result


def control(name: str) -> Tensors:
    """A ControlNet that fits the UNet which its name begins with."""
    from comfy import ops
    from comfy.cldm.cldm import ControlNet

    config = _copied(UNETS[name.split("-")[0]])
    del config["out_channels"]
    with torch.device("meta"):
        net = ControlNet(
            **config, hint_channels=3, operations=ops.disable_weight_init, device="meta"
        )
    filled = {key: fill(key, meta, name) for key, meta in shapes(net).items()}
    for key, value in filled.items():
        if key.startswith("input_hint_block") and value.ndim == 4:
            value *= 2  # or its eight layers would let little of the control image through
    return {f"control_model.{key}": value for key, value in filled.items()}


def main() -> None:
    """Write the file `sys.argv[3]` that holds the fixture `sys.argv[2]`."""
    from comfy.cli_args import args

    args.cpu = True  # Before model_management is imported, which otherwise asks for a GPU.
    name, file = sys.argv[2], Path(sys.argv[3])
    if name.endswith("-lora"):
        tensors = lora()
    elif name == "vae":
        tensors = vae()
    else:
        tensors = control(name) if "-control" in name else checkpoint(name)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


if __name__ == "__main__":
    main()
