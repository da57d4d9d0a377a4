"""What a LoRA file does to one kind of model: taken apart for the weights that it changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.base import WeightAdapterBase

from ..errors import LoraError, first_line, is_cancel, is_out_of_memory
from ..key import digest
from ..memory import pack
from .adapters import LOW_RANK, Part, fits, part_of, tensors_of, with_tensors
from .lora_file import Tensors

_DORA = ("lora", "loha", "lokr")
"""Adapters that may hold DoRA's scale, which divides by the weight's own norm."""


_MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Targets:
    """The weights that a LoRA may change, under every name that the host's loader knows."""

    names: dict[str, Any]
    shapes: dict[str, torch.Size]
    digest: str

    @classmethod
    def of_unet(cls, patcher: ModelPatcher) -> Targets:
        return cls._of(comfy.lora.model_lora_keys_unet(patcher.model, {}), patcher)

    @classmethod
    def of_clip(cls, patcher: ModelPatcher) -> Targets:
        return cls._of(comfy.lora.model_lora_keys_clip(patcher.model, {}), patcher)

    @classmethod
    def _of(cls, names: dict[str, Any], patcher: ModelPatcher) -> Targets:
        shapes = {key: tensor.shape for key, tensor in patcher.model.state_dict().items()}
        # State dicts hold some quantized weights packed, their tensors tell the true shape.
        shapes |= {key: weight.shape for key, weight in patcher.model.named_parameters()}
        # A patch that is loaded now may have made a weight larger.
        shapes |= {key: backup.weight.shape for key, backup in patcher.backup.items()}
        named = sorted((name, repr(key)) for name, key in names.items())
        sizes = sorted((key, tuple(shape)) for key, shape in shapes.items())
        return cls(names, shapes, digest((tuple(named), tuple(sizes))))


@dataclass
class Lora:
    """What one file does to one kind of model.

    parts: what is added to a weight. others: the host's own patches, for what is no mere sum;
    their keys may be (key, offset, function). skipped: a weight's key and why it is left out.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    others: dict[Any, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: set[str] = field(default_factory=set)
    nbytes: int = 0

    @property
    def kinds(self) -> Counter[str]:
        named = [part[0] for part in self.parts.values()]
        return Counter(named + [_kind(patch) for patch in self.others.values()])

    @property
    def ranks(self) -> set[int]:
        return {part[2][1].shape[0] for part in self.parts.values() if part[0] == LOW_RANK}


def take_apart(name: str, tensors: Tensors, targets: Targets, *, pinned: bool) -> Lora:
    """Let the host's loader match the tensors of the file `name`, and copy what is used.

    Raises:
        LoraError: the host's loader cannot make patches of it, half of a pair missing, say.
    """
    recording = _Recording(tensors)
    try:
        patches = comfy.lora.load_lora(recording, targets.names, log_missing=False)
    except Exception as error:  # of a file that is no whole LoRA, whatever it is
        if is_cancel(error) or is_out_of_memory(error):
            raise
        raise LoraError(
            f"The LoRA {name!r} is incomplete or malformed: {first_line(error)}. "
            "Download or convert it again."
        ) from error
    lora = Lora(unmatched=set(tensors) - recording.taken)
    for key, patch in patches.items():
        weight = key if isinstance(key, str) else key[0]
        part, problem = None, None
        try:
            part = part_of(patch) if isinstance(key, str) else None
            problem = _problem(patch, part, targets.shapes.get(weight))
        except (*_MALFORMED, RuntimeError) as error:
            if is_cancel(error) or is_out_of_memory(error):
                raise
            problem = f"it is malformed ({first_line(error)})"
        if problem is not None:
            lora.skipped[weight] = problem
        elif part is None:
            lora.others[key] = patch
        else:
            lora.parts[key] = part
    return _packed(lora, pinned=pinned)


class _Recording(dict[str, torch.Tensor]):
    """Tells which keys the host's loader took; what it returns does not."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.taken.add(key)
        return super().get(key, default)


def _problem(patch: Any, part: Part | None, shape: torch.Size | None) -> str | None:
    """Why a patch cannot be used on a weight of `shape`, as far as that can be told."""
    if shape is None:
        return "the model has no such weight"
    if not all(map(math.isfinite, _numbers(patch if part is None else part))):
        return "NaN or infinity as alpha"
    if not _has_shape(patch, part, shape):
        found = tensors_of(part) if part is not None else list(_tensors(patch))
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        return f"{shapes} do not fit its shape {tuple(shape)}"
    return None


def _has_shape(patch: Any, part: Part | None, shape: torch.Size) -> bool:
    if part is not None:
        return fits(part, shape)
    if isinstance(patch, tuple) and patch[0] == "set":
        return bool(patch[1][0].shape == shape)
    if getattr(patch, "name", None) in _DORA and _kind(patch) == "dora":
        plain = list(patch.weights)
        place = 4 if patch.name == "lora" else -1
        scale, plain[place] = plain[place], None
        rest = part_of(type(patch)(set(), tuple(plain)))
        sizes = (shape[0], shape[1] if len(shape) > 1 else 1)
        return (rest is None or fits(rest, shape)) and scale.numel() in sizes
    return True


def _kind(patch: Any) -> str:
    """What the host does not add but computes otherwise, by name."""
    if isinstance(patch, tuple):
        return str(patch[0])
    if patch.name == "lora" and patch.weights[4] is None:
        return "reshape"
    return "dora" if patch.name in _DORA else str(patch.name)


def _packed(lora: Lora, *, pinned: bool) -> Lora:
    """The same in memory of its own, not in a mapped file; equal shapes lie beside each other,
    so that a switch moves them in one go."""
    by_shape: dict[Any, list[str]] = {}
    for key in sorted(lora.parts):
        specs = tuple((t.shape, t.dtype) for t in tensors_of(lora.parts[key]))
        by_shape.setdefault((lora.parts[key][0], specs), []).append(key)
    order: list[torch.Tensor] = []
    for keys in by_shape.values():
        for members in zip(*(tensors_of(lora.parts[key]) for key in keys), strict=True):
            order += members
    order += [tensor for patch in lora.others.values() for tensor in _tensors(patch)]
    copies, finite = pack(order, pinned=pinned)
    lora.nbytes = sum(copy.nbytes for copy in copies)
    there = {id(tensor): copy for tensor, copy in zip(order, copies, strict=True)}
    lora.parts = {
        key: with_tensors(part, lambda t: there[id(t)]) for key, part in lora.parts.items()
    }
    lora.others = {key: _replaced(patch, there) for key, patch in lora.others.items()}
    if not finite:
        _skip_what_is_not_finite(lora)
    return lora


def _skip_what_is_not_finite(lora: Lora) -> None:
    def finite(tensors: list[torch.Tensor]) -> bool:
        return all(bool(_wide(tensor).isfinite().all()) for tensor in tensors)

    for key in [k for k, part in lora.parts.items() if not finite(tensors_of(part))]:
        lora.skipped[key] = "NaN or infinite values"
        del lora.parts[key]
    for name in [k for k, patch in lora.others.items() if not finite(list(_tensors(patch)))]:
        lora.skipped[name if isinstance(name, str) else name[0]] = "NaN or infinite values"
        del lora.others[name]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in a dtype that torch can ask: fp8 without infinity cannot be."""
    fp8 = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.float() if fp8 else tensor


def _leaves(value: Any) -> Iterator[Any]:
    """All that a patch of the host holds, however deep."""
    if isinstance(value, WeightAdapterBase):
        value = value.weights
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _tensors(patch: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in _leaves(patch) if isinstance(leaf, torch.Tensor))


def _numbers(patch: Any) -> Iterator[float]:
    return (leaf for leaf in _leaves(patch) if isinstance(leaf, int | float))


def _replaced(value: Any, there: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return there[id(value)]
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _replaced(value.weights, there))
    if isinstance(value, tuple | list):
        return type(value)(_replaced(item, there) for item in value)
    return value
