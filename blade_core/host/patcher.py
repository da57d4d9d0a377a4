"""A ModelPatcher that changes LoRAs where the weights are.

The stock one takes the whole model off the GPU and loads it again whenever patches change, so
that every weight moves and every captured step is lost. Here only touched weights are written,
always from their exact base: what was there before leaves no trace.
"""

from __future__ import annotations

import time
import uuid
from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ..errors import first_line, is_cancel
from ..log import logger
from ..structure import modules_of
from .adapters import parts_of
from .rewrite import Rewrite, rewrite

FUSED = "blade_loras"
"""The attachment that says which LoRAs a clone holds (fuse.py)."""

_PATCHED_WHILE_RUNNING = frozenset(
    {
        "weight_function",
        "bias_function",
        "prev_comfy_cast_weights",
        "comfy_force_cast_weights",
    }
)

_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
"""To these the host rounds plainly, as a copy does."""

_BACKUP_SHARE = 4
"""Bases stay on the GPU if they take no more than this part of what is free there."""

# The host's own backups are tuples of this form.
_Backup = namedtuple("_Backup", ["weight", "inplace_update"])


class InPlacePatcher(ModelPatcher):
    """What Blade's clones are, and through `clone` all that come after them."""

    patches: dict[Any, Any]

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> Any:
        """As the host's own, which then finds its patches applied already."""
        loaded = self.model.current_weight_patches_uuid
        if not force_patch_weights and loaded not in (None, self.patches_uuid):
            self._switch(device_to)
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """As the host's own. A model that fits as a whole is loaded first and patched there, so
        that its weights are the same, bit for bit, as after a switch."""
        patches, slots = self.patches, self._slots()
        if device_to is None or not full_load or self.backup or not patches or slots is None:
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        originals = {key: _weight(slots[key], key) for key in patches}
        self.patches = {}
        try:
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
        finally:
            self.patches = patches
        if not self._switch(device_to, originals):
            self.unpatch_model(self.offload_device)
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)

    def _switch(
        self, device: torch.device, originals: dict[str, torch.Tensor] | None = None
    ) -> bool:
        """Write this clone's patches into the loaded weights; False if that is for the host."""
        slots = self._slots() if self._is_resident(device) else None
        if slots is None or any(_weight(slots[key], key).device != device for key in slots):
            return False
        start = time.perf_counter()
        try:
            self._write(slots, device, originals or {})
        except Exception as error:  # whatever a patch raises, the stock way may still work
            if is_cancel(error):
                raise
            self._restore(slots)
            logger.warning(
                "Weights could not be changed in place (%s): loading the model anew.",
                first_line(error),
            )
            return False
        fused = self.attachments.get(FUSED)
        if fused is not None:
            fused.switch_ms = (time.perf_counter() - start) * 1e3
        return True

    def _is_resident(self, device: torch.device) -> bool:
        """Whether the model is on `device` as a whole."""
        model = self.model
        whole = model.model_loaded_weight_memory > 0 and not model.model_lowvram
        return bool(whole and model.device == device)

    def _slots(self) -> dict[str, nn.Module] | None:
        """The layer of each weight that is or will be patched, if a load of this clone does no
        more than move weights and patch them."""
        if (
            self.weight_wrapper_patches
            or self.hook_backup
            or self.forced_hooks is not None
            # These change what a key means, or how a layer computes, in the order of a load.
            or self.object_patches
            or self.object_patches_backup
            or getattr(self, "force_cast_weights", False)
            # Others do at each load what the stock way would bring about here.
            or self.get_all_callbacks(CallbacksMP.ON_LOAD)
        ):
            return None
        if any(map(_casts, modules_of(self.model))):
            return None
        slots = {}
        for key in sorted({*self.backup, *self.patches}):  # as LoRAs lie in memory
            layer = _layer(self.model, key)
            if layer is None or not _is_plain(layer, key.rpartition(".")[2]):
                return None
            if key in self.backup and self.backup[key].weight.shape != _weight(layer, key).shape:
                return None  # a patch has made it larger
            slots[key] = layer
        return slots

    def _write(
        self,
        slots: dict[str, nn.Module],
        device: torch.device,
        originals: dict[str, torch.Tensor],
    ) -> None:
        model = self.model
        # Until all is done these are no one's weights: whoever comes next loads anew.
        model.current_weight_patches_uuid = uuid.uuid4()
        self._back_up([key for key in self.patches if key not in self.backup], slots, originals)
        jobs, rest = [], []
        for key, layer in slots.items():
            weight, base = _weight(layer, key), self.backup[key].weight
            parts = parts_of(self.patches.get(key, ()))
            if parts is None or weight.dtype not in _ROUNDED:
                rest.append(key)
            elif parts:
                jobs.append(Rewrite(weight, base, parts))
        self._restore(slots, (*rest, *(key for key in self.backup if key not in self.patches)))
        rewrite(jobs, device)
        for key in rest:
            self.patch_weight_to_device(key, device, inplace_update=True)
        for key in [key for key in self.backup if key not in self.patches]:
            del self.backup[key]
        model.current_weight_patches_uuid = self.patches_uuid

    def _back_up(
        self, keys: list[str], slots: dict[str, nn.Module], originals: dict[str, torch.Tensor]
    ) -> None:
        """Keep the bases of `keys`: on the GPU if there is plenty of room, else where the host
        keeps them."""
        weights = [_weight(slots[key], key) for key in keys]
        if not weights:
            return
        device, size = weights[0].device, sum(weight.nbytes for weight in weights)
        there = device.type != "cpu" and size <= (
            comfy.model_management.get_free_memory(device) // _BACKUP_SHARE
        )
        if there:
            copies = [torch.empty_like(weight) for weight in weights]
            torch._foreach_copy_(copies, weights)
        else:
            copies = [
                self._base_of(weight, originals.get(key))
                for key, weight in zip(keys, weights, strict=True)
            ]
        self.backup.update(
            (key, _Backup(copy, False)) for key, copy in zip(keys, copies, strict=True)
        )

    def _base_of(self, weight: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
        if original is None or original.data_ptr() == weight.data_ptr():
            return weight.to(self.offload_device, copy=True)
        return original  # from before the load, where the host keeps it, too

    def _restore(self, slots: dict[str, nn.Module], keys: Iterable[str] | None = None) -> None:
        """Write the bases of `keys`, or all, back into their weights."""
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key in self.backup if keys is None else keys:
            base = self.backup[key].weight
            by_device.setdefault(base.device, []).append((_weight(slots[key], key), base))
        for pairs in by_device.values():
            weights, bases = zip(*pairs, strict=True)
            torch._foreach_copy_(list(weights), list(bases))


def _casts(layer: nn.Module) -> bool:
    """Whether a load has told this layer to cast or patch its weights itself."""
    own = vars(layer)
    return not _PATCHED_WHILE_RUNNING.isdisjoint(own) and any(
        own.get(name) for name in _PATCHED_WHILE_RUNNING
    )


def _layer(model: nn.Module, key: str) -> nn.Module | None:
    """The module that holds the weight `key`."""
    layer: nn.Module | None = model
    for name in key.split(".")[:-1]:
        layer = None if layer is None else layer._modules.get(name)
    return layer


def _is_plain(layer: nn.Module, name: str) -> bool:
    """Whether a weight is nothing but a layer's tensor, not quantized."""
    weight = layer._parameters.get(name)
    return (
        not layer._modules  # the host's load passes over what holds other layers
        and type(weight) in (nn.Parameter, torch.Tensor)
        and not hasattr(layer, f"set_{name}")
        and not hasattr(layer, f"convert_{name}")
    )


def _weight(layer: nn.Module, key: str) -> torch.Tensor:
    weight = layer._parameters[key.rpartition(".")[2]]
    assert weight is not None
    return weight.data


def switch_in_place(model: ModelPatcher) -> None:
    """Make `model` change its LoRAs in place; a patcher of another pack stays what it is."""
    if type(model) is ModelPatcher:
        model.__class__ = InPlacePatcher


def as_stock(model: ModelPatcher) -> None:
    """Undo `switch_in_place`."""
    if type(model) is InPlacePatcher:
        model.__class__ = ModelPatcher
