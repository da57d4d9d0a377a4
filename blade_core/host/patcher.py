"""A ModelPatcher that changes LoRAs where the weights are.

The stock one takes the whole model off the GPU and loads it again whenever patches change, so
that every weight moves and every captured step is lost. Here only touched weights are written,
always from their exact base: what was there before leaves no trace.
"""

from __future__ import annotations

import time
import uuid
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

from ..errors import first_line, is_cancel
from ..log import logger
from ..structure import modules_of
from .adapters import FusedDelta, Part, fits, parts_of
from .rewrite import Rewrite, rewrite

FUSED = "blade_loras"
"""The attachment that says which LoRAs a clone holds (fuse.py)."""

_SETTINGS = frozenset({"manual_cast_dtype"})
"""Object patches that hold no weights and change no layer; new hosts set it for text
encoders."""

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
        if self.model.model_lowvram and loaded is not None and loaded is not self.patches_uuid:
            # Equal stacks have equal ids. But once the clone that was loaded is gone, the host
            # takes weights off the GPU in its parent's name, and leaves them without these.
            self.model.current_weight_patches_uuid = uuid.uuid4()
        elif not force_patch_weights and loaded not in (None, self.patches_uuid):
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
        if slots is None or not all(_is_on(_weight(slots[key], key), device) for key in slots):
            return False
        start = time.perf_counter()
        try:
            with torch.no_grad():  # the host's worker has it so; what else loads a model may not
                self._write(slots, device, originals or {})
        except Exception as error:  # whatever a patch raises, the stock way may still work
            if is_cancel(error):
                raise
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
        """Whether the model is on `device` as a whole, set up as a load of this clone would."""
        model = self.model
        if not model.model_loaded_weight_memory or model.model_lowvram or model.device != device:
            return False
        forced = getattr(self, "force_cast_weights", False)
        return all(_is_set_up(layer, forced) for layer in modules_of(model))

    def _slots(self) -> dict[str, nn.Module] | None:
        """The layer of each weight that is or will be patched, if a load of this clone does no
        more than move weights and patch them."""
        if (
            self.weight_wrapper_patches
            or self.hook_backup
            or self.forced_hooks is not None
            # These change what a key means, or how a layer computes, in the order of a load.
            or not _SETTINGS.issuperset({*self.object_patches, *self.object_patches_backup})
            # Others do at each load what the stock way would bring about here.
            or self.get_all_callbacks(CallbacksMP.ON_LOAD)
        ):
            return None
        slots = {}
        for key in sorted({*self.backup, *self.patches}):  # as LoRAs lie in memory
            layer = _layer(self.model, key)
            if layer is None or not _is_plain(layer, key.rpartition(".")[2]):
                return None
            if key in self.backup and self.backup[key].weight.shape != _weight(layer, key).shape:
                return None  # a patch has made it larger
            slots[key] = layer
        if len({_weight(layer, key).data_ptr() for key, layer in slots.items()}) < len(slots):
            return None  # layers that share a weight
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
            patches = self.patches.get(key, ())
            parts = parts_of(patches)
            if parts is None or weight.dtype not in _ROUNDED or not _fit(parts, patches, weight):
                rest.append(key)
            elif parts:
                jobs.append(Rewrite(weight, base, parts))
        summed = {id(job.base) for job in jobs}
        self._restore(slots, [k for k, b in self.backup.items() if id(b.weight) not in summed])
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
        if _fit_there(weights):
            copies = [torch.empty_like(weight) for weight in weights]
            torch._foreach_copy_(copies, weights)
        else:
            copies = [
                self._base_of(weight, originals.get(key))
                for key, weight in zip(keys, weights, strict=True)
            ]
        stays = _is_on(weights[0], self.offload_device)
        for key, copy in zip(keys, copies, strict=True):
            # Nodes that merge models hold the parameter for what the checkpoint had: it stays
            # that, as in stock, and the layer gets another over the same memory.
            parameters, name = slots[key]._parameters, key.rpartition(".")[2]
            old = parameters[name]
            assert old is not None
            parameters[name] = nn.Parameter(old.data, requires_grad=False)
            old.data = copy
            # Where nothing is moved, the host would give the layer the base itself to keep.
            self.backup[key] = _Backup(old, stays)

    def _bases_off_the_gpu(self) -> None:
        """Before the host takes weights off: whoever holds a base shall not hold the GPU's
        memory, and what is short is not spent on bases."""
        for backup in self.backup.values():
            if backup.weight.device != self.offload_device:
                backup.weight.data = backup.weight.data.to(self.offload_device)

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True
    ) -> None:
        if unpatch_weights and device_to is not None:
            self._bases_off_the_gpu()
        super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._bases_off_the_gpu()
        return super().partially_unload(*args, **kwargs)

    def _base_of(self, weight: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
        if original is None or original.is_meta or original.data_ptr() == weight.data_ptr():
            return weight.to(self.offload_device, copy=True)
        return original  # from before the load, where the host keeps it, too

    def _restore(self, slots: dict[str, nn.Module], keys: Iterable[str]) -> None:
        """Write the bases of `keys` back into their weights."""
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key in keys:
            base = self.backup[key].weight
            by_device.setdefault(base.device, []).append((_weight(slots[key], key), base))
        for pairs in by_device.values():
            weights, bases = zip(*pairs, strict=True)
            torch._foreach_copy_(list(weights), list(bases))


def _is_set_up(layer: nn.Module, forced: bool) -> bool:
    """Whether a load would leave this layer as it is: patching nothing while it runs, and told to
    cast its weights if `forced`."""
    own = vars(layer)
    if own.get("weight_function") or own.get("bias_function"):
        return False
    told = "prev_comfy_cast_weights" in own
    return told == forced or not hasattr(type(layer), "comfy_cast_weights")


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
        and not _has(layer, f"set_{name}")
        and not _has(layer, f"convert_{name}")
    )


def _fit(parts: Sequence[Part], patches: Sequence[Any], weight: torch.Tensor) -> bool:
    """Whether the host would apply all of them; of others it says so and goes on without. Blade's
    own were looked at when they were read."""
    own = all(type(patch[1]) is FusedDelta for patch in patches)
    return own or all(fits(part, weight.shape) for part in parts)


def _fit_there(weights: list[torch.Tensor]) -> bool:
    """Whether copies of `weights` take a small part of what a sampling will leave free."""
    device = weights[0].device
    if device.type == "cpu":
        return False
    memory = comfy.model_management
    free = memory.get_free_memory(device) - memory.minimum_inference_memory()
    return sum(weight.nbytes for weight in weights) <= free // _BACKUP_SHARE


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    there = tensor.device
    return there.type == device.type and device.index in (None, there.index)


def _has(layer: nn.Module, name: str) -> bool:
    # nn.Module answers for what it lacks by an exception, which takes long for hundreds.
    return name in vars(layer) or hasattr(type(layer), name)


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
