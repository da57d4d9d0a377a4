"""A ModelPatcher that changes LoRAs where the weights are.

The stock one takes the whole model off the GPU and loads it again whenever patches change, so
that every weight moves and every captured step is lost. Here only touched weights are written,
by the host's own functions and from the host's own backups.
"""

from __future__ import annotations

import uuid
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.patcher_extension import CallbacksMP

from ..errors import first_line, is_cancel
from ..log import logger
from ..structure import modules_of

_PATCHED_WHILE_RUNNING = (
    "weight_function",
    "bias_function",
    "prev_comfy_cast_weights",
    "comfy_force_cast_weights",
)
"""Attributes of a layer that a load has told to cast, or to patch its weights itself."""


class InPlacePatcher(ModelPatcher):
    """What Blade's clones are, and through `clone` all that come after them."""

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """As the host's own, which then finds its patches applied already."""
        if not force_patch_weights:
            try:
                if self._can_switch(device_to):
                    self._switch(device_to)
            except Exception as error:  # whatever a patch raises, the stock way may still work
                if is_cancel(error):
                    raise
                logger.warning(
                    "Weights could not be changed in place (%s): loading the model anew.",
                    first_line(error),
                )
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def _can_switch(self, device_to: torch.device) -> bool:
        """Whether the model is on the device as a whole, with patches but nothing else on it."""
        model = self.model
        loaded = model.current_weight_patches_uuid
        return (
            loaded is not None
            and loaded != self.patches_uuid
            and model.device == device_to
            and not model.model_lowvram
            and model.model_loaded_weight_memory > 0
            and not self.weight_wrapper_patches
            and not self.hook_backup
            # These change what a key means, or how a layer computes, in the order of a load.
            and not self.object_patches
            and not self.object_patches_backup
            and not getattr(self, "force_cast_weights", False)
            # Others do at each load what the stock way would bring about here.
            and not self.get_all_callbacks(CallbacksMP.ON_LOAD)
            and not any(
                any(getattr(module, name, None) for name in _PATCHED_WHILE_RUNNING)
                for module in modules_of(model)
            )
            and all(self._is_plain(key, device_to) for key in {*self.backup, *self.patches})
        )

    def _is_plain(self, key: str, device: torch.device) -> bool:
        """Whether the weight is nothing but a layer's tensor on the device, not quantized."""
        owner = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        weight, set_function, convert_function = get_key_weight(self.model, key)
        return (
            not any(True for _ in owner.children())  # the host's load passes over the others
            and key.rpartition(".")[2] in owner._parameters
            and set_function is None
            and convert_function is None
            and type(weight) in (torch.nn.Parameter, torch.Tensor)
            and weight.device == device
        )

    def _switch(self, device: torch.device) -> None:
        model = self.model
        # Until all is done these are no one's weights: whoever comes next loads anew.
        model.current_weight_patches_uuid = uuid.uuid4()
        for key in list(self.backup):
            comfy.utils.copy_to_param(model, key, self.backup[key].weight)
            if key not in self.patches:
                del self.backup[key]
        for key in self.patches:
            self.patch_weight_to_device(key, device, inplace_update=True)
        model.current_weight_patches_uuid = self.patches_uuid


def switch_in_place(model: ModelPatcher) -> None:
    """Make `model` change its LoRAs in place; a patcher of another pack stays what it is."""
    if type(model) is ModelPatcher:
        model.__class__ = InPlacePatcher


def as_stock(model: ModelPatcher) -> None:
    """Undo `switch_in_place`."""
    if type(model) is InPlacePatcher:
        model.__class__ = ModelPatcher
