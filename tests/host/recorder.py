"""A recorder for the CPU that keeps to what a CUDA graph can do.

Every operation is kept with the very memory that it was given, and done again on it, Python
left out: a weight that moved, a buffer that was freed or a branch that would be taken otherwise
gives the wrong image here as it would on a GPU.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


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

    @staticmethod
    def wait(device: torch.device) -> None:
        """The CPU has done everything when it comes back."""

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
        args, kwargs = tree_map_only(torch.nn.Parameter, _address, (args, kwargs or {}))
        self._operations.append((function, args, kwargs, own))
        return result

    def replay(self) -> None:
        for function, args, kwargs, outputs in self._operations:
            results = [
                t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)
            ]
            for output, result in zip(outputs, results, strict=True):
                if output is not None:
                    output.copy_(result)


def _address(weight: torch.Tensor) -> torch.Tensor:
    """A weight's memory, not kept alive: the parameter may be given other memory later, and this
    may be freed."""
    last = sum((n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True))
    memory = (ctypes.c_byte * ((last + 1) * weight.element_size())).from_address(weight.data_ptr())
    flat = torch.frombuffer(memory, dtype=weight.dtype)
    return flat.as_strided(weight.shape, weight.stride())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
