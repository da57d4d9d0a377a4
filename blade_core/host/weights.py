"""The weights of a unit as a graph wants them: on the device, cast, in the right strides.

Resident weights are passed as they are, so that whatever changes them (LoRA, hooks, another
checkpoint) is seen without asking. Weights that the host keeps elsewhere or patches on the fly
(lowvram) are resolved by the host's own function, per call.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from torch import nn

# What ComfyUI's model patchers keep on a layer: where its weights are and how they get to the
# device. The resolved weights carry all of that, so neither key nor skeleton must see it.
HOST_STATE = frozenset(
    {
        "comfy_cast_weights",
        "prev_comfy_cast_weights",
        "comfy_patched_weights",
        "comfy_force_cast_weights",
        "weight_function",
        "bias_function",
        "weight_lowvram_function",
        "bias_lowvram_function",
        "weight_comfy_model_dtype",
        "bias_comfy_model_dtype",
        "seed_key",
    }
)


Slot = tuple[dict[str, Any], str]
"""Where a layer holds a tensor: the dict, and its name there."""


def parameter_slots(modules: Iterable[nn.Module]) -> list[Slot]:
    return [(m._parameters, k) for m in modules for k, p in m._parameters.items() if p is not None]


class UnitWeights:
    """The weights of one unit during one run, in the order of the graph's arguments."""

    def __init__(self, unit: nn.Module) -> None:
        self.names: list[str] = []
        self._slots: list[tuple[nn.Module, dict[str, Any], str]] = []
        seen: set[int] = set()
        modules = list(unit.named_modules())
        # All parameters, then all buffers, each once: nn.Module.named_parameters' own order.
        for kind in ("_parameters", "_buffers"):
            for prefix, module in modules:
                tensors = getattr(module, kind)
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self.names.append(f"{prefix}.{key}" if prefix else key)
                        self._slots.append((module, tensors, key))
        self._cast: dict[nn.Module, dict[str, int]] = {}
        self.device = torch.device("cpu")
        self._dtype = torch.float32
        self._format = torch.contiguous_format

    def current(self) -> list[torch.Tensor]:
        """The tensors that the layers hold now, wherever they are."""
        return [tensors[key] for _, tensors, key in self._slots]

    def slots(self) -> list[Slot]:
        """Where the layers hold them."""
        return [(tensors, key) for _, tensors, key in self._slots]

    @property
    def resident(self) -> bool:
        """Whether `current` can be passed to a graph without resolving anything."""
        return not self._cast

    def prepare(
        self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> str | None:
        """Find out which weights have to be resolved; return why the unit cannot run compiled."""
        self._cast.clear()
        self.device, self._dtype, self._format = device, dtype, memory_format
        for index, (module, tensors, key) in enumerate(self._slots):
            if not _must_cast(module, key, tensors[key], device, dtype):
                continue
            if hasattr(module, "_v"):
                return "its weights are under dynamic VRAM"
            if not hasattr(module, "weight_function") or key not in ("weight", "bias"):
                where = f"{type(module).__name__}.{key}"
                return f"{where} is on {tensors[key].device}, and only comfy.ops layers offload"
            self._cast.setdefault(module, {})[key] = index
        return None

    def resolve(self) -> tuple[list[torch.Tensor], list[tuple[nn.Module, Any, Any, Any]]]:
        """Bring the weights to the device; give the second result back to `release`."""
        weights = self.current()
        held = []
        for module, indices in self._cast.items():
            weight, bias, handle = comfy.ops.cast_bias_weight(
                module,
                dtype=self._dtype,
                device=self.device,
                bias_dtype=self._dtype,
                offloadable=True,
            )
            held.append((module, weight, bias, handle))
            for key, index in indices.items():
                weights[index] = in_format(weight if key == "weight" else bias, self._format)
        return weights, held

    @staticmethod
    def release(held: Sequence[tuple[nn.Module, Any, Any, Any]]) -> None:
        """Tell the host that the resolved weights were used."""
        for module, weight, bias, handle in held:
            comfy.ops.uncast_bias_weight(module, weight, bias, handle)


class ChannelsLast:
    """Convolution weights in channels-last strides for the length of a run.

    Each is rearranged within its own memory: no second copy, and addresses stay, so that what
    was captured stays valid. Values and names never change. The host's own kernels round
    differently over other strides, so that the weights go back before anyone else uses them.
    Memory that others read during the run, as a stock ControlLora does, is left as it is.
    """

    def __init__(self) -> None:
        self._changed: list[_Change] = []

    def apply(self, weights: Iterable[torch.Tensor], device: torch.device) -> None:
        weights, done, room = list(weights), set(), _Room()
        own = Counter(weight.data_ptr() for weight in weights)
        for weight in weights:
            if (
                weight.ndim == 4
                and type(weight) in (nn.Parameter, torch.Tensor)
                and weight.device == device
                and weight.is_contiguous()
                and not weight.is_contiguous(memory_format=torch.channels_last)
                and holders(weight) <= own[weight.data_ptr()]
            ):
                change = _Change(weight, weight.stride(), weight.data_ptr())
                stride = _channels_last(weight.shape)
                if change.address in done:  # tied weights share their memory
                    _restride(weight, stride)
                else:
                    room.rearrange(weight, stride)
                    done.add(change.address)
                    change.owns_memory = True
                self._changed.append(change)

    @property
    def addresses(self) -> list[int]:
        """Where what was rearranged is."""
        return [change.address for change in self._changed]

    def restore(self) -> None:
        room = _Room()
        while self._changed:  # one by one: if memory runs out, the next call goes on from there
            change = self._changed[-1]
            weight = change.weight
            if weight.is_contiguous(memory_format=torch.channels_last):
                if weight.data_ptr() != change.address:  # the host has moved it meanwhile
                    weight.data = weight.contiguous()
                elif change.owns_memory:
                    room.rearrange(weight, change.stride)
                else:
                    _restride(weight, change.stride)
            self._changed.pop()


class _Room:
    """Memory through which weights are rearranged, one after the other: asking for memory costs
    the CPU more than all else of it."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def rearrange(self, weight: torch.Tensor, stride: tuple[int, ...]) -> None:
        """Give a dense `weight` other strides, and its values in their order, where it is."""
        room = self._memory
        if (
            room is None
            or (room.dtype, room.device) != (weight.dtype, weight.device)
            or room.numel() < weight.numel()
        ):
            self._memory = room = None  # given back first
            self._memory = room = weight.new_empty(weight.numel())
        values = room.as_strided(weight.shape, stride)
        values.copy_(weight)
        _restride(weight, stride)
        weight.data.copy_(values)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, channels, height, width = shape
    return (channels * height * width, 1, width * channels, channels)


@dataclass
class _Change:
    weight: torch.Tensor
    stride: tuple[int, ...]
    address: int
    owns_memory: bool = False


def holders(weight: torch.Tensor) -> int:
    """How many tensors hold the memory of `weight`; 0 where that cannot be told, which is if it
    is a part of a larger memory."""
    storage = weight.untyped_storage()
    if storage.nbytes() != weight.nbytes or not hasattr(torch._C, "_storage_Use_Count"):
        return 0
    # Less the storage's own Python object.
    return torch._C._storage_Use_Count(storage._cdata) - 1


def _restride(weight: torch.Tensor, stride: tuple[int, ...]) -> None:
    weight.data = weight.data.as_strided(weight.shape, stride)


class Watch:
    """Tells whether the host replaced or moved a weight since `start`, or somebody code.

    Changes in place (LoRA hooks) need no notice: graphs read the weights in every call. Code is
    a module's `forward` or hooks, where it had neither: packs set them around some of the calls.
    """

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._tensors: list[torch.Tensor] = []
        self._plain: list[tuple[dict[str, Any], dict[int, Any], dict[int, Any]]] = []
        self.addresses: list[int] = []

    def start(self, slots: list[Slot], modules: Sequence[nn.Module] = ()) -> None:
        self._slots = slots
        self._tensors = [tensors[key] for tensors, key in slots]
        self.addresses = [tensor.data_ptr() for tensor in self._tensors]
        code = ((vars(m), m._forward_hooks, m._forward_pre_hooks) for m in modules)
        self._plain = [parts for parts in code if not _has_code(*parts)]

    def stop(self) -> None:
        self._slots, self._tensors, self._plain, self.addresses = [], [], [], []

    @property
    def first(self) -> torch.Tensor:
        return self._tensors[0]

    def moved(self) -> bool:
        now = [tensors.get(key) for tensors, key in self._slots]
        return (
            not all(map(operator.is_, now, self._tensors))
            or [tensor.data_ptr() for tensor in self._tensors] != self.addresses
            or any(itertools.starmap(_has_code, self._plain))
        )


def _has_code(attributes: dict[str, Any], hooks: dict[int, Any], pre_hooks: dict[int, Any]) -> bool:
    return bool("forward" in attributes or hooks or pre_hooks)


def when_freed(tensor: torch.Tensor, callback: Callable[[], None]) -> weakref.ref[Any] | None:
    """Call `callback` once the memory of `tensor` is given up, as long as the result is kept.

    The host tells no one but the patcher that loaded a model when it takes it off the GPU. None
    where torch gives a storage no Python object that lasts (before 2.1).
    """
    lasting = weakref.ref(tensor.untyped_storage())
    if lasting() is None:
        return None
    return weakref.ref(tensor.untyped_storage(), lambda _: callback())


def in_format(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """`tensor` in the strides that graphs are given: `memory_format` if 4-D, else contiguous."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=memory_format)
    return tensor.contiguous()


def checksum(weights: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Sums over the bit patterns: tells a changed weight, whoever changed it. One sync."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [w.detach().view(integer[w.element_size()]).sum(dtype=torch.int64) for w in weights]
    return tuple(torch.stack(sums).tolist())


def _must_cast(
    module: nn.Module, key: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> bool:
    if tensor.device != device or getattr(module, f"{key}_function", None):
        return True
    # The host casts this layer because of a setting of its own; layers whose class casts
    # (manual_cast) do it inside the graph.
    forced = module.__dict__.get("comfy_cast_weights", False)
    by_class = getattr(type(module), "comfy_cast_weights", False)
    return forced and not by_class and tensor.dtype != dtype
