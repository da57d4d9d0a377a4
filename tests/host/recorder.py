"""A recorder for the CPU that keeps to what a CUDA graph can do.

Every operation is kept with the very tensors that it was given, and done again on them, Python
left out: a weight that moved, a buffer that was freed or a branch that would be taken otherwise
gives the wrong image here as it would on a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeRecorder:
    """Takes `sizes` as what each recording needs, so that budgets can be tested."""

    sizes: int = 2**20

    def __init__(self, device: torch.device) -> None:
        self._used = 0

    @staticmethod
    def usable(device: torch.device) -> bool:
        return True

    @staticmethod
    def waits() -> AbstractContextManager[list[str]]:
        return nullcontext([])

    def used_bytes(self) -> int:
        return self._used

    def release(self) -> None:
        self._used = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        with tape:
            function()
        self._used += self.sizes
        return tape.replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[torch.Tensor | None]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        assert not any(isinstance(leaf, bool | int | float) for leaf in tree_leaves(result)), (
            f"{function} waits for the device"
        )
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        # What shares memory with an argument is a view, or the argument itself.
        own = [t if _storage(t) not in given else None for t in new]
        self._operations.append((function, args, kwargs or {}, own))
        return result

    def replay(self) -> None:
        for function, args, kwargs, outputs in self._operations:
            results = [
                t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)
            ]
            for output, result in zip(outputs, results, strict=True):
                if output is not None:
                    output.copy_(result)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
