"""The encoder or the decoder of an SD VAE, whose layers run compiled, over the same engine.

The host's own forward runs over a shadow, in which each layer is a holder. The module that came
in, which stock VAEs share, is never touched. A run is one call, image by image: no batch size
needs graphs of its own, and no more memory than one image takes.

Images so small that the GPU waits for each launch are captured. A capture holds the memory that
a decode takes, so larger ones are not: launching them costs no time.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.diffusionmodules import model as host
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from torch import nn

from ..capture import CaptureBudget
from ..config import OptimizeConfig
from ..engine import Engine
from .optimized import OptimizedModel
from .progress import CompileProgress
from .shadow import Holder, shadow
from .vae_block import VAELayer

CODERS = (Encoder, Decoder)
"""What the host builds SD1.5's and SDXL's VAEs of, and video VAEs with other convolutions."""

_INTERPOLATE_UP = getattr(host, "interpolate_up", None)
"""What layers call by name, so that no key counts it."""

_HOST_FORWARDS = {kind: kind.forward for kind in CODERS}

_SHARE = 0.25
"""Of the time that launching takes: if the GPU has no more left to do then, it has waited."""


class _Launched(NamedTuple):
    """How the last image was launched."""

    device: torch.device
    seconds: float
    missed: bool
    """Whether graphs had to be compiled or loaded."""


class OptimizedVAE(OptimizedModel):
    """The Encoder or the Decoder of a VAE."""

    inside = ("conv_in", "down", "mid", "up", "norm_out", "conv_out")
    counters = ("vae_runs", "vae_replays")
    one_call = True
    # Each weight is read once in a run: graphs rearrange it faster than a run can there and back.
    rearranges = False

    def __init__(
        self, model: nn.Module, engine: Engine, budget: CaptureBudget, config: OptimizeConfig
    ) -> None:
        super().__init__(model, engine, budget, config)
        self.name = f"VAE {self.name.lower()}"
        self._launched = _Launched(torch.device("cpu"), 0.0, False)

    def _hold(self, model: nn.Module) -> dict[str, nn.Module]:
        self.blocks = []

        # What holds itself waits for Python's collector, and the weights with it.
        this: Any = weakref.proxy(self)
        holders: dict[str, nn.Module] = {}
        for name, layer in _layers(model):
            block = VAELayer(name, layer)
            self.blocks.append(block)
            holders[name] = Holder(partial(OptimizedVAE._run_layer, this, block))
        return holders

    def _blocks(self, model: Any) -> list[nn.Module]:
        return [layer for _, layer in _layers(model)]

    def __call__(
        self,
        coder: nn.Module,
        x: torch.Tensor,
        *,
        progress: CompileProgress,
        freeze: bool,
        **options: Any,
    ) -> torch.Tensor:
        """Run one call of the host's Encoder or Decoder.

        x: (B, C, H, W), pixels or a latent in the VAE's dtype.
        options: what else the host passes; nothing to SD's VAEs.
        """
        with self._lock:
            reason = _foreign_code(coder) or _other_form(x, options)
            if reason is not None:
                self.end()
                self._refuse(reason)
            elif self._ready(coder, x, progress, freeze) is not None:
                try:
                    images = [self._image(coder, image) for image in x.split(1)]
                    return torch.cat(images)
                finally:
                    self._progress.finish(self._is_pending())
                    self.end()
        result: torch.Tensor = coder(x, **options)
        return result

    def _image(self, coder: nn.Module, image: torch.Tensor) -> torch.Tensor:
        """What `coder` makes of one image, laid out as stock's result is."""
        assert self._run is not None
        if self._captures.usable(image.device):
            signature = (image.shape, image.dtype, *_baked(coder))
            result = self._as_one(signature, [image], None, partial(self._launch, coder))
            if result is not None:
                return result
        self._run.pieces = None  # blocks one by one would hold as much memory as all together
        return self._launch(coder, [image])

    def _launch(self, coder: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Let the host run the one image over the holders."""
        counters = self._engine.counters
        found, start = counters["cache_misses"], time.perf_counter()
        result: torch.Tensor = shadow(coder, self._holders)(images[0]).contiguous()
        seconds, missed = time.perf_counter() - start, counters["cache_misses"] != found
        self._launched = _Launched(images[0].device, seconds, missed)
        return result

    def _pays_not(self) -> str | None:
        """The host waits for the result, too, so that waiting here costs nothing."""
        start = time.perf_counter()
        self._captures.pool.wait(self._launched.device)
        waited = time.perf_counter() - start
        if waited > _SHARE * self._launched.seconds:
            return "launching an image of this size takes the CPU less time than the GPU needs"
        return None

    def _tells_nothing(self) -> bool:
        return self._launched.missed

    def _run_layer(
        self, block: VAELayer, h: torch.Tensor, *others: Any, **more: Any
    ) -> torch.Tensor:
        assert self._run is not None
        return block(self._run, h, *others, **more)


def _layers(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What the host's forward calls, by name: all but the containers around it."""
    for name, child in model.named_children():
        if type(child) in (nn.Module, nn.ModuleList):
            yield from _layers(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _baked(coder: nn.Module) -> Iterator[Any]:
    """What the host's forward goes by, besides its layers."""
    yield getattr(host, "nonlinearity", None)
    for name, value in vars(coder).items():
        if isinstance(value, bool | int | float | str):
            yield name, value


def _foreign_code(coder: nn.Module) -> str | None:
    """Why a call of this coder is not what the host's own code alone would do. What is inside of
    its layers is looked at by block.py."""
    kind = type(coder)
    if kind not in CODERS:
        return f"another node pack put a {kind.__name__} into the VAE"
    if kind.forward is not _HOST_FORWARDS[kind] or not kind.forward.__module__.startswith("comfy."):
        return f"another node pack replaced ComfyUI's {kind.__name__}.forward"
    if "forward" in vars(coder):
        return f"another node pack replaced the {kind.__name__}'s forward"
    if coder._forward_hooks or coder._forward_pre_hooks:
        return f"the {kind.__name__} has hooks"
    if getattr(host, "interpolate_up", None) is not _INTERPOLATE_UP:
        return "another node pack replaced ComfyUI's interpolate_up"
    return None


def _other_form(x: Any, options: dict[str, Any]) -> str | None:
    if options:
        return f"the host passes {', '.join(options)}"
    if x.ndim != 4 or not len(x):
        return f"it was given a tensor of {x.ndim} dimensions, and {len(x)} images"
    return None
