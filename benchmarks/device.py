"""The device that is measured: its clock, its memory, and what its profiler saw."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.kinds import KINDS, kind_of

_CALLS = ("Launch", "Memcpy", "Memset")
"""In the names of the CUDA API's calls that start work on the GPU."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Marks:
    """Points in the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def add(self) -> None:
        """Mark the point at which the device will have done what it was asked so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Times between the marks; waits for the last."""
        synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


class Memory:
    """Peaks of GPU memory from here on; nothing on the CPU."""

    def __init__(self, device: torch.device, before: int | None = None) -> None:
        self._cuda = device.type == "cuda"
        self.before = (_used() if before is None else before) if self._cuda else 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, Any]:
        """The row's memory fields. The device's own figure holds what CUDA graphs hold, too."""
        if not self._cuda:
            return {}
        torch.cuda.synchronize()
        return {
            "peak_vram_gib": _gib(torch.cuda.max_memory_allocated()),
            "peak_reserved_gib": _gib(torch.cuda.max_memory_reserved()),
            "peak_device_gib": _gib(_used() - self.before),
            "allocator": torch.cuda.get_allocator_backend(),
        }


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _gib(count: int) -> float:
    return round(count / 2**30, 3)


class Trace(AbstractContextManager["Trace"]):
    """What the profiler sees of the device between two marks; of the CPU's operators where the CPU
    is it.

    The profiler is ready from the start, so that what is traced follows at once on work that
    brought the device to the clock at which it runs for long.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._kind = DeviceType.CUDA if cuda else DeviceType.CPU
        self._profile = profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
        )

    def __enter__(self) -> "Trace":
        self._profile.start()
        return self

    def mark(self) -> None:
        """Begin what is traced; the second time, end it."""
        synchronize(self._device)
        self._profile.step()

    def __exit__(self, *_: object) -> None:
        self._profile.stop()

    def per_step(self, steps: int) -> dict[str, Any]:
        """The row's fields from the profiler, of a trace that holds `steps` steps."""
        assert self._profile.profiler is not None and self._profile.profiler.kineto_results
        events = self._profile.profiler.kineto_results.events()
        device = [
            event
            for event in events
            if event.device_type() == self._kind and not event.name().startswith("ProfilerStep")
        ]
        spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in device]
        busy, whole = _covered(spans), max(e for _, e in spans) - min(s for s, _ in spans)
        by_kind = dict.fromkeys(KINDS, 0)
        for event in device:
            by_kind[kind_of(event.name())] += event.duration_ns()
        calls = [e for e in events if any(part in e.name() for part in _CALLS)]
        launches = sum(event.device_type() == DeviceType.CPU for event in calls)
        return {
            "step_kernel_ms": round(busy / 1e6 / steps, 3),
            "idle_ms": round((whole - busy) / 1e6 / steps, 3),
            "kernels_per_step": round(len(device) / steps, 1),
            "launches_per_step": round(launches / steps, 1),
            "kinds_ms": {kind: round(ns / 1e6 / steps, 3) for kind, ns in by_kind.items()},
        }


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Nanoseconds that the spans cover; what overlaps counts once."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
