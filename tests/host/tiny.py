"""The real ComfyUI in this process, and tiny real models of random weights for it."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from devtools.host import check_host, default_host_path

HOST = check_host(Path(os.environ.get("BLADE_COMFY") or default_host_path()))
sys.path.insert(0, str(HOST))
# Chosen by tests/gpu/conftest.py; the host reads its command line while it is imported.
DEVICE = torch.device(os.environ.get("BLADE_TEST_DEVICE", "cpu"))
_arguments, sys.argv = sys.argv, ["main.py"]
if DEVICE.type == "cpu":
    sys.argv += ["--cpu", "--use-pytorch-cross-attention"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402

sys.argv = _arguments
torch.set_num_threads(1)  # the models are so small that threads only wait for each other

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "use_temporal_attention": False,
}
SDXL = SD15 | {
    "num_heads": -1,
    "num_head_channels": 8,
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "adm_in_channels": 32 + 6 * 256,  # pooled prompt and six sizes, as SDXL.encode_adm
    "num_classes": "sequential",
}


def make_model(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher of a real UNet with random weights; the same seed gives the same weights."""
    kind = comfy.supported_models.SDXL if "num_classes" in config else comfy.supported_models.SD15
    model_config = kind({**config, "dtype": dtype})
    model_config.set_inference_dtype(dtype, None)
    model = model_config.get_model({})
    # As torch's own layers start: a network of larger weights turns rounding into other images.
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.diffusion_model.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 50
        noise = torch.randn(parameter.shape, generator=generator) * (3 * fan_in) ** -0.5
        parameter.data = (noise + (parameter.ndim == 1)).to(dtype)
    return comfy.model_patcher.ModelPatcher(model, DEVICE, torch.device("cpu"))


def conditioning(tokens: int = 77, seed: int = 1, width: int = 32, **extra: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 32, generator=generator), **extra}]]


def sample(
    model: Any,
    *,
    size: tuple[int, int] = (16, 16),
    batch: int = 1,
    steps: int = 2,
    cfg: float = 5.0,
    seed: int = 0,
    sampler: str = "euler",
    positive: Any = None,
    negative: Any = None,
) -> torch.Tensor:
    """One KSampler run of the host, in the mode that its prompt worker uses."""
    latent = torch.zeros(batch, 4, *size)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed),
            steps,
            cfg,
            sampler,
            "normal",
            positive or conditioning(seed=1),
            negative or conditioning(seed=2),
            latent,
            seed=seed,
            disable_pbar=True,
        )


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt())
