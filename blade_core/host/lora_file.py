"""LoRA files: read once, taken apart for the weights they change, kept within a budget."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import nn

from ..errors import LoraError, first_line, is_cancel, is_out_of_memory
from ..memory import Arena
from .adapters import LOW_RANK, Part, fits, part_of, tensors_of, with_tensors

Tensors = dict[str, torch.Tensor]


def lora_names() -> list[str]:
    """All files in ComfyUI's loras folders."""
    return list(folder_paths.get_filename_list("loras"))


def lora_versions(names: Sequence[str]) -> list[LoraFile | None]:
    """The files as they are now; None for what cannot be found."""
    found: list[LoraFile | None] = []
    for name in names:
        try:
            found.append(LoraFile.find(name))
        except LoraError:
            found.append(None)
    return found


@dataclass(frozen=True)
class LoraFile:
    """A file as it is now: another time or size makes another one."""

    name: str
    path: str
    modified_ns: int
    size: int

    @classmethod
    def find(cls, name: str) -> LoraFile:
        """Find `name` in ComfyUI's loras folders.

        Raises:
            LoraError: there is no such file, or the name leads out of those folders.
        """
        path = PurePath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
            raise LoraError(
                f"The LoRA name {name!r} leads out of ComfyUI's loras folders. "
                "Put the file into one of them and choose it there."
            )
        found = folder_paths.get_full_path("loras", name)
        if found is None:
            raise LoraError(
                f"There is no LoRA {name!r} in ComfyUI's loras folders. "
                "Choose another file, or switch this row off."
            )
        status = os.stat(found)
        return cls(name, found, status.st_mtime_ns, status.st_size)

    def read(self) -> Tensors:
        """Read it as the host's own loader does: no code in it is ever run.

        Raises:
            LoraError: the file cannot be read, or is no dictionary of tensors.
        """
        try:
            tensors = comfy.utils.load_torch_file(self.path, safe_load=True)
            tensors = comfy.lora_convert.convert_lora(tensors)
            tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        except Exception as error:  # whatever a reader of three formats raises
            if is_cancel(error) or is_out_of_memory(error):
                raise
            raise LoraError(
                f"The LoRA {self.name!r} cannot be read: {first_line(error)}. Expected a "
                "safetensors file, or a checkpoint of nothing but tensors. Download it again."
            ) from error
        return tensors


@dataclass(frozen=True)
class Targets:
    """The weights that a LoRA may change, under every name that the host's loader knows."""

    names: dict[str, Any]
    shapes: dict[str, torch.Size]
    digest: int

    @classmethod
    def of_unet(cls, model: nn.Module) -> Targets:
        return cls._of(comfy.lora.model_lora_keys_unet(model, {}), model)

    @classmethod
    def of_clip(cls, model: nn.Module) -> Targets:
        return cls._of(comfy.lora.model_lora_keys_clip(model, {}), model)

    @classmethod
    def _of(cls, names: dict[str, Any], model: nn.Module) -> Targets:
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        digest = hash((tuple(sorted(names.items(), key=str)), tuple(sorted(shapes.items()))))
        return cls(names, shapes, digest)


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


def _kind(patch: Any) -> str:
    return str(getattr(patch, "name", None) or patch[0])


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


def take_apart(tensors: Tensors, targets: Targets, arena: Arena) -> Lora:
    """Let the host's loader match `tensors`, and copy what can be fused into `arena`."""
    recording = _Recording(tensors)
    lora = Lora()
    for key, patch in comfy.lora.load_lora(recording, targets.names, log_missing=False).items():
        part = part_of(patch) if isinstance(key, str) else None
        if part is None:
            lora.others[key] = _copied(patch, arena)  # or it would stay in a mapped file
        elif key not in targets.shapes:
            lora.skipped[key] = "the model has no such weight"
        elif not fits(part, targets.shapes[key]):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(part))
            lora.skipped[key] = f"{shapes} do not fit its shape {tuple(targets.shapes[key])}"
        else:
            lora.parts[key] = part
    lora.unmatched = set(tensors) - recording.taken
    lora.parts = _packed(lora.parts, arena)
    if not arena.surely_finite():
        for key in [k for k, part in lora.parts.items() if not _finite(part)]:
            lora.skipped[key] = "NaN or infinite values"
            del lora.parts[key]
    found = [tensor for part in lora.parts.values() for tensor in tensors_of(part)]
    lora.nbytes = sum(tensor.nbytes for tensor in found)
    return lora


def _copied(value: Any, arena: Arena) -> Any:
    if isinstance(value, torch.Tensor):
        return arena.copy(value)
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _copied(value.weights, arena))
    if isinstance(value, tuple | list):
        return type(value)(_copied(item, arena) for item in value)
    return value


def _finite(part: Part) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(part))


def _packed(parts: dict[str, Part], arena: Arena) -> dict[str, Part]:
    """The same in the arena, equal shapes beside each other: a switch moves them in one go."""
    by_shape: dict[Any, list[str]] = {}
    for key in sorted(parts):
        specs = tuple((t.shape, t.dtype) for t in tensors_of(parts[key]))
        by_shape.setdefault((parts[key][0], specs), []).append(key)
    copies: dict[str, dict[int, torch.Tensor]] = {key: {} for key in parts}
    for keys in by_shape.values():
        for slot in range(len(tensors_of(parts[keys[0]]))):
            for key in keys:
                tensor = tensors_of(parts[key])[slot]
                copies[key][id(tensor)] = arena.copy(tensor)
    return {key: with_tensors(part, lambda t: copies[key][id(t)]) for key, part in parts.items()}  # noqa: B023


class LoraLibrary:
    """LoRAs that were read, least recently used out first; what a model still holds stays alive."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.reads = 0
        self._lock = threading.RLock()
        self._loras: OrderedDict[tuple[LoraFile, int], Lora] = OrderedDict()
        self._targets: weakref.WeakKeyDictionary[nn.Module, Targets] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(lora.nbytes for lora in self._loras.values())

    def unet_targets(self, model: nn.Module) -> Targets:
        return self._remembered(model, Targets.of_unet)

    def clip_targets(self, model: nn.Module) -> Targets:
        return self._remembered(model, Targets.of_clip)

    def has(self, file: LoraFile, targets: Sequence[Targets]) -> bool:
        """Whether `get` would have to read nothing."""
        with self._lock:
            return all((file, one.digest) in self._loras for one in targets)

    def get(self, file: LoraFile, targets: Sequence[Targets], *, pinned: bool) -> list[Lora]:
        """What `file` does to each of `targets`; the file is read if it was not for all of them.

        pinned: keep the tensors where a GPU fetches them several times faster.
        """
        keys = [(file, one.digest) for one in targets]
        with self._lock:
            known = [self._loras[key] for key in keys if key in self._loras]
        if len(known) < len(keys):
            tensors, arena = file.read(), Arena(pinned=pinned)
            known = [take_apart(tensors, one, arena) for one in targets]
        with self._lock:
            self.reads += not self.has(file, targets)
            for key, lora in zip(keys, known, strict=True):
                self._loras[key] = lora
                self._loras.move_to_end(key)
            self._shrink(keep=len(keys))
        return known

    def _shrink(self, keep: int) -> None:
        total = sum(lora.nbytes for lora in self._loras.values())
        while total > self.budget and len(self._loras) > keep:
            total -= self._loras.popitem(last=False)[1].nbytes

    def _remembered(self, model: nn.Module, make: Any) -> Targets:
        with self._lock:
            if model not in self._targets:
                self._targets[model] = make(model)
            return self._targets[model]
