"""Host memory for many tensors that travel to a GPU together."""

from __future__ import annotations

import torch

_BLOCK = 2**25
"""Bytes. Torch rounds pinned memory up to a power of two, so that one size wastes nothing."""
_ALIGNMENT = 64


class Arena:
    """Copies tensors one behind the other into few blocks, which live as long as any copy.

    pinned: in page-locked memory, if there is any left.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._blocks: dict[torch.dtype, list[torch.Tensor]] = {}
        self._used: dict[torch.dtype, int] = {}  # elements of the last block

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a CPU tensor."""
        blocks = self._blocks.setdefault(tensor.dtype, [])
        count, used = tensor.numel(), self._used.get(tensor.dtype, 0)
        if not blocks or used + count > blocks[-1].numel():
            blocks.append(self._new_block(tensor))
            used = 0
        aligned = _ALIGNMENT // tensor.element_size()
        self._used[tensor.dtype] = used + -(-count // aligned) * aligned
        return blocks[-1][used : used + count].view(tensor.shape).copy_(tensor)

    def surely_finite(self) -> bool:
        """Whether no tensor holds NaN or infinity, as far as sums over whole blocks tell: they
        may overflow without."""
        return all(
            bool(block.sum(dtype=torch.float32).isfinite())
            for dtype, blocks in self._blocks.items()
            if dtype.is_floating_point
            for block in blocks
        )

    def _new_block(self, tensor: torch.Tensor) -> torch.Tensor:
        count = max(tensor.numel(), _BLOCK // tensor.element_size())
        with torch.inference_mode(False):  # or no one could write it outside of that mode
            if self._pinned:
                try:
                    block = torch.empty(count, dtype=tensor.dtype, pin_memory=True)
                except RuntimeError:  # the system locks no more pages
                    self._pinned = False
            if not self._pinned:
                block = torch.empty(count, dtype=tensor.dtype)
        return block.zero_()  # what lies between tensors and behind them is summed, too
