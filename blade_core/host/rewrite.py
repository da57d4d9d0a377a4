"""Weights written anew where they are: base + sum of parts, many equal shapes at a time.

A switch of LoRAs touches hundreds of weights; one by one, launches and small copies would take
most of its time. What comes from host memory comes on a stream of its own, one chunk ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapters import LOW_RANK, Part, add_parts, tensors_of

_CHUNK, _CPU_CHUNK = 2**28, 2**24
"""Bytes of fp32 that are worked on at a time; the device's peak is about two of it. On a CPU
larger blocks would come from the system anew each time, which takes longer than the work."""


@dataclass(frozen=True)
class Rewrite:
    """`weight` shall hold `base` plus all `parts`; both have one shape and a float dtype."""

    weight: torch.Tensor
    base: torch.Tensor
    parts: Sequence[Part]


def rewrite(jobs: Iterable[Rewrite], device: torch.device) -> None:
    """Do all `jobs`, whose weights are on `device`. Nothing waits for the device."""
    chunks = [_Chunk(part) for group in _groups(jobs) for part in _parts(group)]
    if not chunks:
        return
    carrier = _Carrier(device, max(chunk.bytes_to_carry(device) for chunk in chunks))
    for chunk in chunks:
        _do(chunk.jobs, carrier.bring(chunk.slots))
        carrier.done()


class _Chunk:
    """Jobs of one form that are done together.

    slots: what has to be on the device, lists of equal tensors: the bases, then each factor of
    each low-rank part.
    """

    def __init__(self, jobs: list[Rewrite]) -> None:
        self.jobs = jobs
        factors = [[t for p in job.parts if p[0] == LOW_RANK for t in p[2]] for job in jobs]
        self.slots = [[job.base for job in jobs], *map(list, zip(*factors, strict=True))]

    def bytes_to_carry(self, device: torch.device) -> int:
        slots = [slot for slot in self.slots if slot[0].device != device]
        return sum(_aligned(slot[0].nbytes * len(slot)) for slot in slots)


def _groups(jobs: Iterable[Rewrite]) -> Iterator[list[Rewrite]]:
    """Jobs of one form beside each other."""
    groups: dict[Any, list[Rewrite]] = {}
    for job in jobs:
        # The upper factor's shape and the weight's give the lower's.
        specs = tuple(
            (up.shape, up.dtype, up.device, down.dtype)
            for up, down in (p[2] for p in job.parts if p[0] == LOW_RANK)
        )
        form = (job.weight.shape, job.weight.dtype, job.base.device, specs)
        groups.setdefault(form, []).append(job)
    yield from groups.values()


def _parts(group: list[Rewrite]) -> Iterator[list[Rewrite]]:
    job = group[0]
    factors = sum(t.numel() for p in job.parts if p[0] == LOW_RANK for t in tensors_of(p))
    most = _CPU_CHUNK if job.weight.device.type == "cpu" else _CHUNK
    count = max(1, most // (4 * (job.weight.numel() + 2 * factors) or 1))
    for start in range(0, len(group), count):
        yield group[start : start + count]


def _do(chunk: list[Rewrite], slots: list[torch.Tensor | list[torch.Tensor]]) -> None:
    first = chunk[0]
    shape = first.weight.shape
    total = torch.empty((len(chunk), *shape), dtype=torch.float32, device=first.weight.device)
    bases = slots[0]
    if isinstance(bases, torch.Tensor):
        total.copy_(bases)
    else:
        torch._foreach_copy_(list(total.unbind()), bases)
    _add_low_rank(total, chunk, slots[1:])
    for one, job in zip(total, chunk, strict=True):
        others = [part for part in job.parts if part[0] != LOW_RANK]
        if others:
            add_parts(one, others)
    torch._foreach_copy_([job.weight for job in chunk], list(total.unbind()))


def _add_low_rank(total: torch.Tensor, chunk: list[Rewrite], slots: list[Any]) -> None:
    """Add the products of all factors of one weight as one product."""
    if not slots:
        return
    count = len(chunk)
    stacked = [slot if isinstance(slot, torch.Tensor) else torch.stack(slot) for slot in slots]
    ups, downs = stacked[0::2], stacked[1::2]
    rows, columns = ups[0].shape[1], downs[0].shape[2]
    if any(up.shape[1] != rows for up in ups):  # the same product of other factors: 1x1 kernels
        for one, job in zip(total, chunk, strict=True):
            add_parts(one, [part for part in job.parts if part[0] == LOW_RANK])
        return
    rank = sum(up.shape[2] for up in ups)
    left, right = total.new_empty(count, rows, rank), total.new_empty(count, rank, columns)
    start = 0
    scales = [[p[1] for p in job.parts if p[0] == LOW_RANK] for job in chunk]
    for number, (up, down) in enumerate(zip(ups, downs, strict=True)):
        stop = start + up.shape[2]
        left[:, :, start:stop].copy_(up)
        right[:, start:stop].copy_(down)
        factors = [scale[number] for scale in scales]
        if len(set(factors)) == 1:
            left[:, :, start:stop].mul_(factors[0])
        else:
            left[:, :, start:stop].mul_(total.new_tensor(factors).view(-1, 1, 1))
        start = stop
    total.view(count, rows, columns).baddbmm_(left, right)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


class _Carrier:
    """Brings tensors to the device through two buffers in turn, so that the copies of a chunk
    run beside the work on the one before."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._turn = 0
        self._stream = None
        if device.type != "cuda":
            return
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._main = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)
        # The buffers' memory may still be in use by what the main stream has yet to do.
        self._done = [self._main.record_event() for _ in range(2)]

    def bring(self, slots: list[list[torch.Tensor]]) -> list[Any]:
        """Each slot of equal tensors as one stacked tensor there; what is there stays a list."""
        if self._stream is None:
            return [self._as_is(slot) for slot in slots]
        self._stream.wait_event(self._done[self._turn])
        buffer, used = self._buffers[self._turn], 0
        result: list[Any] = []
        try:
            with torch.cuda.stream(self._stream):
                for slot in slots:
                    if slot[0].device == self._device:
                        result.append(slot)
                        continue
                    size = slot[0].nbytes * len(slot)
                    there = buffer[used : used + size].view(slot[0].dtype)
                    there = there.view(len(slot), *slot[0].shape)
                    used += _aligned(size)
                    for start, run in _runs(slot):
                        there[start : start + len(run)].copy_(run, non_blocking=True)
                    result.append(there)
        finally:  # also where a copy fails: the buffers go back to where the main stream allocates
            self._main.wait_stream(self._stream)
        return result

    def _as_is(self, slot: list[torch.Tensor]) -> Any:
        return [tensor.to(self._device) for tensor in slot]

    def done(self) -> None:
        """The work on what was brought last is on its way."""
        if self._stream is not None:
            self._done[self._turn] = self._main.record_event()
            self._turn = 1 - self._turn


def _runs(tensors: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """`tensors` of one shape as few tensors: those that lie one behind the other are one copy."""
    size = tensors[0].nbytes
    addresses = [t.data_ptr() if t.is_contiguous() else None for t in tensors]
    start = 0
    while start < len(tensors):
        head, address = tensors[start], addresses[start]
        count = 1
        if address is not None:
            storage = head.untyped_storage()
            most = (storage.data_ptr() + storage.nbytes() - address) // size if size else 1
            for after in addresses[start + 1 : start + most]:
                if after != address + count * size:
                    break
                count += 1
        yield start, head.as_strided((count, *head.shape), (head.numel(), *head.stride()))
        start += count
