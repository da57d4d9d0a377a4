"""Tiny real VAEs of random weights, and stock's way with them."""

from collections.abc import Callable
from typing import Any

import torch
from blade_tests.host.control_nets import fill
from blade_tests.host.tiny import DEVICE, relative_rms
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.sd import VAE

from blade.blade_core.config import OptimizeConfig
from blade.blade_core.host.model import Session
from blade.nodes.optimize_vae import BladeOptimizeVAE

BOUND = 1e-4
EAGER = OptimizeConfig(backend="eager", on_failure="error")
FALLBACK = OptimizeConfig(backend="eager")
# Four stages, as the host counts on for its sizes.
SMALL: dict[str, Any] = {
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "double_z": True,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
FULL = SMALL | {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
LAYERS = {"decoder": 2 + 3 + 4 * 2 + 3 + 1, "encoder": 2 + 3 + 4 + 3 + 1}
"""How many the host's forward of SMALL calls: the two ends, mid, stages with their samplers."""

Use = Callable[[Any], torch.Tensor]


def make_vae(
    seed: int = 0, dtype: torch.dtype = torch.float32, config: dict[str, Any] = SMALL
) -> Any:
    """A VAE as the host's loader makes it; the same seed gives the same weights."""
    model = AutoencoderKL(ddconfig=config, embed_dim=4)
    fill(model.parameters(), seed)
    params = {"params": {"ddconfig": config, "embed_dim": 4}}
    return VAE(sd=model.state_dict(), config=params, device=DEVICE, dtype=dtype)


def optimized(vae: Any, config: OptimizeConfig = EAGER, *, enabled: bool = True) -> Any:
    """`vae` behind Blade's node."""
    dials = (config.backend, config.freeze_weights, config.on_failure, enabled)
    return BladeOptimizeVAE().optimize(vae, *dials)[0]


def latent(batch: int = 1, size: tuple[int, int] = (8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def pixels(batch: int = 1, size: tuple[int, int] = (64, 64), seed: int = 0) -> torch.Tensor:
    """An IMAGE, (batch, height, width, 3)."""
    return torch.rand(batch, *size, 3, generator=torch.Generator().manual_seed(seed))


def used(vae: Any, use: Use) -> torch.Tensor:
    """What `use` makes with a VAE, in the mode of the host's prompt worker, and from one seed."""
    with torch.inference_mode():
        torch.manual_seed(0)
        return use(vae).cpu().clone()


def decode(batch: int = 1, size: tuple[int, int] = (8, 8), seed: int = 0) -> Use:
    return lambda vae: vae.decode(latent(batch, size, seed))


def encode(batch: int = 1, size: tuple[int, int] = (64, 64), seed: int = 0) -> Use:
    return lambda vae: vae.encode(pixels(batch, size, seed))


def assert_as_stock(vae: Any, ours: Any, *uses: Use, bound: float = BOUND) -> list[torch.Tensor]:
    """`ours` gives what `vae` gives, which stays as it was; return that."""
    results = []
    for use in uses:
        expected = used(vae, use)
        actual = used(ours, use)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert relative_rms(actual, expected) <= bound
        assert torch.equal(used(vae, use), expected)
        results.append(expected)
    return results


def reports(session: Session) -> dict[str, dict[str, Any]]:
    """What Blade says of each encoder and decoder; of the last where several have one name."""
    return {report["model"]: report for report in session.stats()["vaes"]}


def eager_blocks(session: Session, name: str = "VAE decoder") -> dict[str, str]:
    """The blocks that ran as stock in the last run, and why."""
    blocks = reports(session)[name]["blocks"]
    return {b["block"]: "; ".join(b["reasons"]) for b in blocks if b["reasons"]}
