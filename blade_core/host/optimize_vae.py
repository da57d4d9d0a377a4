"""BladeOptimizeVAE's work: a VAE that runs through Blade, as a copy of the host's.

The host's own code decodes, encodes, tiles and loads; only its model is a proxy, which calls
Blade. What came in stays as it was, for whoever else uses it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.models.autoencoder import (
    AutoencoderKL,
    AutoencodingEngine,
    AutoencodingEngineLegacy,
)
from comfy.sd import VAE
from torch import nn

from ..config import OptimizeConfig
from ..log import logger
from . import model as host
from .dynamic import non_dynamic_vae
from .progress import say
from .vae import CODERS
from .vae_proxy import VAEProxy

_MODELS = (AutoencoderKL, AutoencodingEngine, AutoencodingEngineLegacy)


def optimize_vae(vae: Any, config: OptimizeConfig, *, node_id: str | None = None) -> Any:
    """Return a copy of `vae` whose layers run compiled, or `vae` itself with a message.

    An earlier Blade node's settings are replaced.

    Raises:
        BackendUnavailable: `on_failure` is `error` and the backend cannot run here.
    """
    vae = stock_vae(vae)
    reason = _why_not(vae)
    if reason is not None:
        message = f"This VAE runs as stock: {reason}."
        logger.info(message)
        say(message, node_id)
        return vae
    if config.strict:
        host.session().engine.backends(config, vae.device)
    host.session().engine.expect(config, vae.device)
    stock = (vae.first_stage_model, vae.patcher)
    model, patcher = non_dynamic_vae(vae)
    result = copy.copy(vae)
    result.first_stage_model = VAEProxy(model, config, node_id, stock)
    result.patcher = patcher
    if _makes_new_tensors(vae.process_output):
        result.process_output = ToPixels(vae.process_output)
    return result


def stock_vae(vae: Any) -> Any:
    """Return `vae` as stock runs it: itself, or a copy without an earlier node's Blade."""
    proxy = getattr(vae, "first_stage_model", None)
    if not isinstance(proxy, VAEProxy):
        return vae
    result = copy.copy(vae)
    result.first_stage_model, result.patcher = proxy.stock
    if isinstance(result.process_output, ToPixels):
        result.process_output = result.process_output.stock
    return result


class ToPixels:
    """What hosts such as 0.3.75 make of a decoder's result on the CPU, with one new tensor instead
    of three: two to three times as fast for large images. Later ones change it in place."""

    def __init__(self, stock: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.stock = stock

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Values of -1 to 1 as 0 to 1, in the host's own order, so to the last bit."""
        return torch.add(image, 1.0).div_(2.0).clamp_(0.0, 1.0)


def _makes_new_tensors(process_output: Any) -> bool:
    """Whether it computes the same, and leaves what it is given as it is."""
    given = torch.linspace(-3.0, 3.0, 96).view(1, 3, 4, 8)
    image = given.clone()
    try:
        result = process_output(image)
    except Exception:  # another pack's, for other images than these
        return False
    return torch.equal(image, given) and torch.equal(result, ToPixels(process_output)(given))


def _why_not(vae: Any) -> str | None:
    if not isinstance(vae, VAE):
        return f"Blade does not know {type(vae).__module__}.{type(vae).__name__}"
    model: Any = vae.first_stage_model
    if type(model) not in _MODELS:
        return f"it holds a {type(model).__name__}, not an SD1.5 or SDXL kind of VAE"
    for coder in (model.encoder, model.decoder):
        if type(coder) not in CODERS:
            kind = type(coder)
            return f"it holds a {kind.__module__}.{kind.__name__}, which Blade does not know"
    if any(isinstance(module, nn.Conv3d) for module in model.modules()):
        return "it is a VAE for video"
    return None
