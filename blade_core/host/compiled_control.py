"""The host's ControlNet over a proxy: begin and end of its runs, and residuals that come late."""

from __future__ import annotations

from typing import Any

import torch
from comfy.controlnet import ControlNet, StrengthType
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .control_proxy import Proxy
from .late import LateControl, LateResiduals

_ALWAYS = (0.0, 1.0)


class CompiledControlNet(ControlNet):
    """The host's ControlNet over a Proxy."""

    control_model: Proxy | Any
    cond_hint: torch.Tensor | None
    _strength: tuple[Any, torch.Tensor] | None = None
    _images: dict[tuple[int, ...], torch.Tensor] | None = None
    """Control images as the host has scaled them in this run, by the latents' form."""
    _of_blade = False
    """Whether the UNet of this step runs through Blade."""

    def copy(self) -> CompiledControlNet:
        return compiled(ControlNet.copy(self))

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        self.control_model.begin_run(model)
        ControlNet.pre_run(self, model, percent_to_timestep_function)
        if tuple(self.timestep_percent_range) == _ALWAYS:
            # The host would ask the GPU for the timestep in every step, and wait for it.
            self.timestep_range = None

    def cleanup(self) -> None:
        if isinstance(self.control_model, Proxy):
            self.control_model.state.end()
        self._strength = self._images = None
        ControlNet.cleanup(self)

    def get_control(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Any,
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:
        wrappers = transformer_options.get("wrappers", {})
        self._of_blade = "blade" in wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
        # The host scales the image anew whenever sizes change, as areas do within each step.
        images, form = self._images or {}, tuple(x_noisy.shape)
        scaled = any(self.cond_hint is image for image in images.values())
        if scaled:  # and not a pack's own tile of it
            self.cond_hint = images.get(form, self.cond_hint)
        before = self.cond_hint
        control = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.cond_hint is not None and (scaled or self.cond_hint is not before):
            self._images = images | {form: self.cond_hint}
        return control

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> Any:
        """For another GPU (hosts from 0.23 on): the host's patcher wants the model itself."""
        clone = super().deepclone_multigpu(load_device, autoregister)
        theirs = clone.control_model_wrapped
        clone.control_model_wrapped = ModelPatcher(
            clone.control_model.model, theirs.load_device, theirs.offload_device
        )
        return clone

    def control_merge(self, control: Any, control_prev: Any, output_dtype: Any) -> Any:
        """The host's, or later: see late.py."""
        links = _links(control_prev)
        if (
            links is not None
            and output_dtype is None
            and self._may_be_late(control)
            and all(one.call.shapes == control.call.shapes for _, one, _ in links)
        ):
            link = (self, control, self._strength_on(control.call.given[0].device))
            return LateControl([*links, link])
        return super().control_merge(control, control_prev, output_dtype)

    def _may_be_late(self, control: Any) -> bool:
        return (
            self._of_blade
            and isinstance(control, LateResiduals)
            and control.call.net.captures
            and not self.global_average_pooling
            and self.strength_type == StrengthType.CONSTANT
        )

    def _strength_on(self, device: torch.device) -> torch.Tensor:
        wanted = (self.strength, device)
        if self._strength is None or self._strength[0] != wanted:
            value = torch.tensor(self.strength, dtype=torch.float32, device=device)
            self._strength = (wanted, value)
        return self._strength[1]


def _links(previous: Any) -> tuple[Any, ...] | None:
    """What comes before in a chain, if all of that comes late."""
    if previous is None:
        return ()
    return previous.links if isinstance(previous, LateControl) and previous.untouched else None


def compiled(control: Any) -> CompiledControlNet:
    """`control`, a copy that the host made, as a CompiledControlNet."""
    control.__class__ = CompiledControlNet  # the host's copy() makes its own class
    result: CompiledControlNet = control
    return result
