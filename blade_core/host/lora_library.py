"""LoRA files that were read, kept within a budget."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

from comfy.model_patcher import ModelPatcher
from torch import nn

from .lora_file import LoraFile
from .lora_parts import Lora, Targets, take_apart


class LoraLibrary:
    """LoRAs that were read, least recently used out first; what a model still holds stays alive."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.reads = 0
        self._lock = threading.RLock()
        self._loras: OrderedDict[tuple[LoraFile, str], Lora] = OrderedDict()
        self._targets: weakref.WeakKeyDictionary[nn.Module, Targets] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(lora.nbytes for lora in self._loras.values())

    def unet_targets(self, patcher: ModelPatcher) -> Targets:
        return self._remembered(patcher, Targets.of_unet)

    def clip_targets(self, patcher: ModelPatcher) -> Targets:
        return self._remembered(patcher, Targets.of_clip)

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
            tensors = file.read()
            known = [take_apart(file.name, tensors, one, pinned=pinned) for one in targets]
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

    def _remembered(
        self, patcher: ModelPatcher, make: Callable[[ModelPatcher], Targets]
    ) -> Targets:
        with self._lock:
            if patcher.model not in self._targets:
                self._targets[patcher.model] = make(patcher)
            return self._targets[patcher.model]
