"""What stands in a VAE for its model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import OptimizeConfig
from . import model as host
from .progress import CompileProgress
from .shadow import Holder, shadow


class VAEProxy:
    """Stands for first_stage_model where the host calls it.

    stock: first_stage_model and patcher of the VAE that came in.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizeConfig,
        node_id: str | None,
        stock: tuple[nn.Module, Any],
    ) -> None:
        self._model, self._config, self._node_id = model, config, node_id
        self.stock = stock

    def decode(self, z: torch.Tensor, *args: Any, **options: Any) -> Any:
        """The host's own decode, but for its decoder."""
        return self._with("decoder").decode(z, *args, **options)

    def encode(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        """The host's own encode, but for its encoder: what is random in it stays the host's."""
        return self._with("encoder").encode(x, *args, **options)

    def _with(self, name: str) -> Any:
        """The model, with Blade in the place of its encoder or decoder."""
        coder = getattr(self._model, name)
        state = host.session().vae(coder, self._config)
        progress = CompileProgress(self._node_id, "first image")
        run = partial(state, coder, progress=progress, freeze=self._config.freeze_weights)
        return shadow(self._model, {name: Holder(run)})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in vars(self):  # asked for by `copy`
            raise AttributeError(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What packs put into the model, such as another decoder, is for the model; what they put
        in the place of the methods here is for those who call them."""
        own = name in ("_model", "_config", "_node_id", "stock") or hasattr(type(self), name)
        object.__setattr__(self, name, value) if own else setattr(self._model, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> VAEProxy:
        model, stock = copy.deepcopy((self._model, self.stock), memo)
        return VAEProxy(model, self._config, self._node_id, stock)
