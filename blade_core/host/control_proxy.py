"""What stands in a ControlNet for its model, and what a sampling run of it begins and ends with."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ..config import OptimizeConfig
from ..errors import ControlNetError
from . import model as host
from .control import OptimizedControlNet
from .late import LateResiduals
from .progress import CompileProgress


class Proxy:
    """Stands for the model of a ControlNet where the host calls it."""

    def __init__(self, model: nn.Module, config: OptimizeConfig, node_id: str | None) -> None:
        self._model, self._config, self._node_id = model, config, node_id
        self._misfit: tuple[int | None, ControlNetError] | None = None
        """Where the model takes prompts of another width: which, and what to say of any other."""

    @property
    def state(self) -> OptimizedControlNet:
        return host.session().controlnet(self._model, self._config)

    def __call__(
        self,
        x: torch.Tensor,
        hint: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The host's ControlNet.forward, done when somebody looks at the result."""
        if self._misfit is not None and context.shape[-1] != self._misfit[0]:
            raise self._misfit[1]
        args = (x, hint, timesteps, context, y)
        call = self.state.prepare(
            self._model,
            args,
            others,
            progress=CompileProgress(self._node_id),
            freeze=self._config.freeze_weights,
        )
        stock = partial(self._model, *args, **others)
        return stock() if call is None else LateResiduals(call, stock)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in vars(self):  # asked for by `copy`
            raise AttributeError(name)
        return getattr(self._model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        return Proxy(copy.deepcopy(self._model, memo), self._config, self._node_id)

    @property
    def model(self) -> nn.Module:
        """What it stands for."""
        return self._model

    def begin_run(self, model: Any) -> None:
        """A sampling run of `model`, the host's BaseModel, begins.

        Raises:
            ControlNetError: the ControlNet was made for another kind of model. One for prompts of
                another width may still get its own (the host's CLIPTextEncodeControlnet): if it
                does not, its first call raises.
        """
        differ, error = _compared(self._model, model)
        if differ not in ([], ["prompts"]):
            raise error
        self._misfit = (_made_of(self._model)["prompts"], error) if differ else None
        state = self.state
        state.end()
        state.sampled_with = weakref.ref(model.diffusion_model)
        # Of a run that was cancelled the host tells the model's patcher, but no ControlNet.
        patcher = model.current_patcher
        if patcher is None:
            return
        key = f"blade controlnet {id(state)}"

        def end(_: Any) -> None:
            state.end()
            patcher.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)

        patcher.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, key)
        patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, end)


def check_fits(control_model: Any, model: Any) -> None:
    """Refuse a ControlNet whose inputs are not those of `model`, the host's BaseModel.

    Raises:
        ControlNetError: naming what both are made of.
    """
    differ, error = _compared(control_model, model)
    if differ:
        raise error


def _compared(control_model: Any, model: Any) -> tuple[list[str], ControlNetError]:
    """Which of their sizes differ, and what to say of it."""
    kind = type(model.model_config).__name__
    unet = getattr(model, "diffusion_model", None)
    ours, theirs = _made_of(control_model), _made_of(unet) if isinstance(unet, UNetModel) else {}
    # What a ControlNet does not take need not fit: small ones have no attention.
    differ = [what for what, size in ours.items() if size not in (None, theirs.get(what))]
    return differ, ControlNetError(
        f"This ControlNet does not fit the model. It was made for a UNet with {_words(ours)}; "
        f"the model is {kind}, with {_words(theirs)}. Load a "
        f"ControlNet that was made for {kind}."
    )


def _made_of(model: Any) -> dict[str, int | None]:
    """Sizes that a ControlNet and its UNet have in common; None for what it does not have."""
    prompts = [m for name, m in model.named_modules() if name.endswith("attn2.to_k")]
    label = None
    if model.num_classes is not None:
        label = next(m for m in model.label_emb.modules() if hasattr(m, "in_features"))
    return {
        "channels": model.model_channels,
        "prompts": prompts[0].in_features if prompts else None,
        "label": None if label is None else label.in_features,
    }


def _words(sizes: dict[str, int | None]) -> str:
    if not sizes:
        return "no UNet of that kind"
    text = f"{sizes['channels']} channels"
    if sizes["prompts"] is not None:
        text += f" and prompts of width {sizes['prompts']}"
    if sizes["label"] is not None:
        text += f", and a label of width {sizes['label']}"
    return text
