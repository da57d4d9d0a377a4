"""A UNet whose blocks run compiled, for the length of one call, in one model clone only.

Nothing in the UNet is replaced for good: within a call of the clone that passed through the
node, the three containers of blocks are swapped for holders, which the host hands back to
`_run_block` through its own `forward_timestep_embed_patch`, and so are the layers behind them,
which it calls. Other clones of the same model never see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules import openaimodel
from torch import nn

from ..capture import CaptureBudget
from ..config import OptimizeConfig
from ..engine import Engine
from .late import LateControl
from .optimized import OptimizedModel
from .patches import UNPATCHED, Patched, read_patches
from .progress import CompileProgress
from .shadow import Holder as StandIn
from .step import Call, foreign_code, read_call
from .unet_block import OutBlock, UNetBlock

_CONTAINERS = (("input_blocks", "input"), ("middle_block", "middle"), ("output_blocks", "output"))
_OUT = "out"


class Holder(nn.Module):
    """Stands for one block inside a call. The block is hidden from state_dict and parameters."""

    def __init__(self, block: UNetBlock) -> None:
        super().__init__()
        object.__setattr__(self, "optimized", block)


class OptimizedUNet(OptimizedModel):
    """A UNet of SD1.5's or SDXL's kind."""

    inside = (*(name for name, _ in _CONTAINERS), _OUT)
    counters = ("runs", "replays")

    def __init__(
        self, unet: nn.Module, engine: Engine, budget: CaptureBudget, config: OptimizeConfig
    ) -> None:
        super().__init__(unet, engine, budget, config)
        self._patched: Patched = UNPATCHED
        self._join: Callable[[], None] = _nothing

    def _hold(self, model: nn.Module) -> dict[str, nn.Module]:
        self.blocks = []
        holders: dict[str, nn.Module] = {}
        for container, short in _CONTAINERS:
            module = getattr(model, container)
            if module is None:
                continue
            single = container == "middle_block"
            held = []
            for index, block in enumerate([module] if single else module):
                name = container if single else f"{container}.{index}"
                optimized = UNetBlock(name, (short, index), block)
                self.blocks.append(optimized)
                held.append(openaimodel.TimestepEmbedSequential(Holder(optimized)))
            if container != "output_blocks":
                self._encodes_last = optimized  # there are UNets without a middle block
            holders[container] = held[0] if single else nn.ModuleList(held)
        last = OutBlock(_OUT, getattr(model, _OUT))
        self.blocks.append(last)
        # What holds itself waits for Python's collector, and the weights with it.
        this: Any = weakref.proxy(self)
        holders[_OUT] = StandIn(partial(OptimizedUNet._run_out, this, last))
        return holders

    def _blocks(self, model: Any) -> list[nn.Module]:
        middle = [] if model.middle_block is None else [model.middle_block]
        return [*model.input_blocks, *middle, *model.output_blocks, model.out]

    def call(
        self,
        executor: Callable[..., torch.Tensor],
        unet: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        progress: CompileProgress,
        freeze: bool,
        hooked: bool,
    ) -> torch.Tensor:
        """Run one call of the host's UNet; `args` are (x, timesteps, context, y, control,
        transformer_options). `hooked`: the host may change weights in place between calls."""
        with self._lock:
            run = self._ready(unet, args[0], progress, freeze)
            if run is None:
                return executor(*args, **kwargs)
            if hooked:
                self._captures.projections.forget()
            self._patched = read_patches(args[5])
            if not self._captures.usable(args[0].device):
                run.pieces = None
                return self._launch(executor, unet, args, kwargs)
            return self._capture(executor, unet, args, kwargs)

    def _capture(
        self, executor: Any, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        control = args[4]
        late = isinstance(control, LateControl) and control.untouched
        calls = control.calls() if late else None
        call = read_call(args if calls is None else (*args[:4], None))
        reason = foreign_code(executor, kwargs, self._patched)
        if call is None:
            reason, call = "its arguments have an unknown form", Call([], ())
        signature, tensors, count = call.signature, call.tensors, len(call.tensors)
        if calls is not None:
            signature, tensors = (*signature, calls.signature), [*tensors, *calls.tensors]

        def work(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            *plain, control = call.arguments(tensors[:count])
            if calls is not None:
                control, self._join = calls.launch(tensors[count:])
            # Blocks that run as stock may go by the options; then none of this is recorded.
            return self._launch(executor, unet, (*plain, control, args[5]), {})

        within = () if calls is None else calls.models
        result = self._as_one(signature, tensors, reason, work, within)
        if result is None:
            return self._launch(executor, unet, args, kwargs)
        if calls is not None:
            control.consume()
        for residuals in (control or {}).values():
            residuals.clear()  # as the host does, taking one after the other
        return result

    def _launch(
        self, executor: Any, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Let the host run the call over the holders."""
        options = args[5]
        patches = dict(options.get("patches", {}))
        patches["forward_timestep_embed_patch"] = [
            (Holder, self._run_block),
            *patches.get("forward_timestep_embed_patch", ()),
        ]
        modules = unet._modules
        stock = {name: modules[name] for name in self._holders}
        modules.update(self._holders)
        try:
            return executor(*args[:5], {**options, "patches": patches}, **kwargs)
        finally:
            modules.update(stock)
            self._join()
            self._join = _nothing
            self._captures.projections.end_call()
            self._progress.finish(self._is_pending())

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
        block: UNetBlock = holder.optimized  # type: ignore[assignment]
        result = block(h, emb, context, options, output_shape, video, self._run, self._patched)
        if block is self._encodes_last:
            self._join()  # from here on the host adds what ControlNets gave
        return result

    def _run_out(self, block: OutBlock, h: torch.Tensor) -> torch.Tensor:
        assert self._run is not None
        return block(h, self._run, self._patched)


def _nothing() -> None:
    """There is no second stream to wait for."""
