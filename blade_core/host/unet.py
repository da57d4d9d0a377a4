"""A UNet whose blocks run compiled, for the length of one call, in one model clone only.

Nothing in the UNet is replaced for good: within a call of the clone that passed through the
node, the three containers of blocks are swapped for holders, which the host hands back to
`_run_block` through its own `forward_timestep_embed_patch`. Other clones of the same model
never see them.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import nn

from ..backends import Backend
from ..config import OptimizeConfig
from ..engine import Engine
from ..errors import BackendUnavailable
from ..key import GraphKey, environment
from ..log import logger, warn_once
from ..structure import describe_classes
from .block import OptimizedBlock, RunContext
from .patches import UNPATCHED, Patched, read_patches
from .progress import CompileProgress
from .weights import ChannelsLast

_CONTAINERS = (("input_blocks", "input"), ("middle_block", "middle"), ("output_blocks", "output"))
_HOST_FORWARD = openaimodel.forward_timestep_embed


class Holder(nn.Module):
    """Stands for one block inside a call. The block is hidden from state_dict and parameters."""

    def __init__(self, block: OptimizedBlock) -> None:
        super().__init__()
        object.__setattr__(self, "optimized", block)


class OptimizedUNet:
    """What Blade knows of one UNet under one configuration. Holds no reference to the UNet."""

    def __init__(self, unet: nn.Module, engine: Engine, config: OptimizeConfig) -> None:
        self.name = type(unet).__name__
        self.config = config
        self.blocks: list[OptimizedBlock] = []
        self.why_not: str | None = None
        self.compilers: tuple[str, ...] = ()
        self._engine = engine
        self._lock = threading.RLock()
        self._layout = ChannelsLast()
        self._run: RunContext | None = None
        self._patched: Patched = UNPATCHED
        self._weights: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._bound = 0
        self._classes: dict[type[nn.Module], tuple[Any, ...]] = {}
        self._progress = CompileProgress(None)
        self._holders = self._hold(unet)

    def _hold(self, unet: nn.Module) -> dict[str, nn.Module]:
        self.blocks = []
        holders: dict[str, nn.Module] = {}
        for container, short in _CONTAINERS:
            module = getattr(unet, container)
            if module is None:
                continue
            single = container == "middle_block"
            held = []
            for index, block in enumerate([module] if single else module):
                name = container if single else f"{container}.{index}"
                optimized = OptimizedBlock(name, (short, index), block)
                self.blocks.append(optimized)
                held.append(openaimodel.TimestepEmbedSequential(Holder(optimized)))
            holders[container] = held[0] if single else nn.ModuleList(held)
        return holders

    def call(
        self,
        executor: Callable[..., torch.Tensor],
        unet: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        progress: CompileProgress,
        freeze: bool,
    ) -> torch.Tensor:
        """Run one call of the host's UNet; `args` are (x, timesteps, context, y, control,
        transformer_options)."""
        x, options = args[0], args[5]
        with self._lock:
            if self._run is None or self._weights_moved():
                self._begin(unet, x, progress, freeze)
            run = self._run
            if run is None:
                return executor(*args, **kwargs)
            self._patched = read_patches(options)
            patches = dict(options.get("patches", {}))
            patches["forward_timestep_embed_patch"] = [
                (Holder, self._run_block),
                *patches.get("forward_timestep_embed_patch", ()),
            ]
            options = {**options, "patches": patches}
            modules = unet._modules
            stock = {name: modules[name] for name in self._holders}
            modules.update(self._holders)
            try:
                return executor(*args[:5], options, **kwargs)
            finally:
                modules.update(stock)
                self._progress.finish()

    def end(self) -> None:
        """End of a run: give the weights back as they were, let go of everything per run."""
        with self._lock:
            run, self._run = self._run, None
            self._layout.restore()
            self._weights, self._addresses = [], []
            if run is not None:
                for block in self.blocks:
                    block.end(self._engine.counters)

    def _run_block(
        self,
        holder: Holder,
        h: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None,
        options: dict[str, Any],
        output_shape: Any,
        *video: Any,
    ) -> torch.Tensor:
        # The host's forward_timestep_embed_patch handler; `video` is (time_context,
        # num_video_frames, image_only_indicator).
        assert self._run is not None
        block: OptimizedBlock = holder.optimized  # type: ignore[assignment]
        return block(h, emb, context, options, output_shape, video, self._run, self._patched)

    def _begin(
        self, unet: nn.Module, x: torch.Tensor, progress: CompileProgress, freeze: bool
    ) -> None:
        self.end()
        self.why_not = None
        try:
            backends = self._engine.backends(self.config, x.device)
        except BackendUnavailable as error:
            if self.config.strict:
                raise
            self._refuse(str(error))
            return
        forward = openaimodel.forward_timestep_embed
        if forward is not _HOST_FORWARD or forward.__module__ != openaimodel.__name__:
            self._refuse("another node pack replaced ComfyUI's forward_timestep_embed")
            return
        if torch.is_grad_enabled():
            self._refuse("gradients are enabled")
            return
        if [block.block for block in self.blocks] != _blocks(unet):  # a block was replaced
            self._holders = self._hold(unet)
        self._bound = 0
        self._progress = progress
        self.compilers = tuple(backend.name for backend in backends)
        memory_format = _memory_format(x, backends[0])
        run = RunContext(
            engine=self._engine,
            config=self.config,
            backends=backends,
            environment=environment(x.device, (*_host_environment(), str(memory_format))),
            memory_format=memory_format,
            freeze=freeze,
            checkpoint=comfy.model_management.throw_exception_if_processing_interrupted,
            announce=self._announce,
            bound=self._count_bound,
            weights_changed=_say_rebuild,
        )
        if run.memory_format == torch.channels_last:
            self._layout.apply([w for b in _blocks(unet) for w in b.parameters()], x.device)
        classes = describe_classes(unet)
        for block in self.blocks:
            if classes != self._classes:
                block.forget()
            block.begin(x.device, x.dtype, run)
        self._classes = classes
        self._weights = [w for block in self.blocks for w in block.weights()]
        self._addresses = [w.data_ptr() for w in self._weights]
        self._run = run
        self._engine.counters.add("runs")

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        warn_once(f"This model runs as stock: {reason}")

    def _announce(self, key: GraphKey) -> None:
        total = sum(len(block.units) for block in self.blocks)
        self._progress.compiling(key, self._bound, total)

    def _count_bound(self) -> None:
        self._bound += 1

    def _weights_moved(self) -> bool:
        """Whether the host replaced or moved a weight since the run began.

        In-place changes (LoRA hooks) need no notice: graphs read the weights in every call.
        """
        now = [w for block in self.blocks for w in block.weights()]
        return (
            len(now) != len(self._weights)
            or not all(map(operator.is_, now, self._weights))
            or [w.data_ptr() for w in now] != self._addresses
        )

    def report(self) -> dict[str, Any]:
        """What the last run did, block by block."""
        return {
            "model": self.name,
            "backend": self.config.backend,
            "compilers": list(self.compilers),
            "freeze_weights": self.config.freeze_weights,
            "on_failure": self.config.on_failure,
            "runs_as_stock": self.why_not,
            "blocks": [block.report() for block in self.blocks],
        }


def _blocks(unet: Any) -> list[nn.Module]:
    """The blocks in the order of OptimizedUNet.blocks."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    return [*unet.input_blocks, *middle, *unet.output_blocks]


def _memory_format(x: torch.Tensor, backend: Backend) -> torch.memory_format:
    """Channels last is what tensor cores and CPU kernels want; fp32 on a GPU gains nothing."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if backend.channels_last and (x.device.type == "cpu" or (x.device.type == "cuda" and half)):
        return torch.channels_last
    return torch.contiguous_format


def _host_environment() -> tuple[str, ...]:
    """The host's part of every key: the attention function, chosen at start or by another pack."""
    attention = comfy.ldm.modules.attention
    names = ("optimized_attention", "optimized_attention_masked")
    functions = [getattr(attention, name) for name in names]
    return tuple(f"{f.__module__}.{getattr(f, '__qualname__', repr(f))}" for f in functions)


def _say_rebuild() -> None:
    logger.warning(
        "freeze_weights is on and the weights changed (LoRA, checkpoint or strength): Blade "
        "compiles again. Turn freeze_weights off to switch without compiling."
    )
