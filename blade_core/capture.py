"""Work recorded once, over input and output buffers of its own, and replayed after that.

Captures of one owner share a memory pool: what one needs between its first and its last kernel
is free again for the next.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from .counters import Counters
from .errors import CaptureFailed, first_line, is_cancel, is_out_of_memory
from .log import warn_once
from .recorder import Recorder

Function = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""What is captured. It reads its inputs, and tensors whose addresses stay; it never syncs."""


@dataclass(frozen=True)
class Work:
    """What may be captured, for inputs of one form.

    why_not: asked after a first call; the reason why later ones may not be recorded.
    keep: asked then too; what the kernels use and must not be freed before the capture is.
    not_yet: asked then too; whether later calls will do the work in another way, to be recorded.
    """

    function: Function
    why_not: Callable[[], str | None]
    keep: Callable[[], Any]
    not_yet: Callable[[], bool] = bool


class Capture:
    """One recorded function with its buffers."""

    def __init__(
        self,
        inputs: list[torch.Tensor],
        output: torch.Tensor,
        replay: Callable[[], None],
        keep: Any,
        nbytes: int,
    ) -> None:
        self.nbytes = nbytes
        self._inputs = inputs
        self._output = output
        self._replay = replay
        self._keep = keep

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run on `inputs`, of the shapes and dtypes that it was recorded with.

        The result is the caller's own: the buffers are written again by the next replay.
        """
        torch._foreach_copy_(self._inputs, list(inputs))
        self._replay()
        return self._output.clone()


class CapturePool:
    """The captures of one owner, and the device memory that they hold until `clear`."""

    def __init__(self, budget: CaptureBudget) -> None:
        self.last_used = 0
        self._budget = budget
        self._captures: dict[Hashable, Capture] = {}
        self._refused: dict[Hashable, str] = {}
        # Captures of one pool run one after the other, so that equal buffers serve them all.
        self._buffers: weakref.WeakValueDictionary[Hashable, torch.Tensor]
        self._buffers = weakref.WeakValueDictionary()
        self._recorder: Recorder | None = None
        budget.pools.add(self)

    def __len__(self) -> int:
        return len(self._captures)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.clear()  # with its owner

    @property
    def nbytes(self) -> int:
        return sum(capture.nbytes for capture in list(self._captures.values()))

    def usable(self, device: torch.device) -> bool:
        """Whether work on `device` can be captured at all."""
        return self._budget.usable(device)

    def waits(self) -> AbstractContextManager[list[str]]:
        """Collect what waits for the device inside the block: it cannot be recorded."""
        return self._budget.recorder.waits()

    def wait(self, device: torch.device) -> None:
        """Until the device has done what it was given so far."""
        self._budget.recorder.wait(device)

    def get(self, key: Hashable) -> Capture | None:
        capture = self._captures.get(key)
        if capture is not None:
            self.last_used = next(self._budget.clock)
        return capture

    def refused(self, key: Hashable) -> str | None:
        """Why `key` will not be captured, if that was found out before."""
        return self._refused.get(key)

    def record(
        self, key: Hashable, work: Work, inputs: Sequence[torch.Tensor], like: torch.Tensor
    ) -> Capture:
        """Capture `work` for inputs such as these; `like` has the form of its result.

        Raises:
            CaptureFailed: with the reason in words. The pool is empty then, its memory free.
        """
        start = time.perf_counter()
        self.last_used = next(self._budget.clock)
        try:
            self._captures[key] = self._record(work, inputs, like)
            if not self._budget.make_room(self) and len(self) > 1:
                self.clear(unseen=1)  # a pool gives memory back only as a whole
                self._captures[key] = self._record(work, inputs, like)
        except BaseException as error:
            self.clear(unseen=int(key in self._captures))
            if not isinstance(error, Exception) or is_cancel(error):
                raise
            transient = is_out_of_memory(error)
            reason = "out of memory" if transient else first_line(error)
            message = f"its CUDA graph could not be captured: {reason}"
            if not transient:
                self._refused[key] = message
            raise CaptureFailed(message, transient=transient) from error
        if self._budget.exceeded():
            message = self._budget.too_small(self._captures[key].nbytes)
            self.clear(unseen=1)
            self._refused[key] = message
            raise CaptureFailed(message, transient=True)
        self._budget.counters.add("captures")
        self._budget.counters.add_capture_seconds(time.perf_counter() - start)
        return self._captures[key]

    def discard(self, key: Hashable) -> None:
        """Drop one capture, if it is there; most of its memory goes back with the others."""
        if self._captures.pop(key, None) is not None:
            self._budget.counters.add("captures_dropped")
            if not self._captures:
                self.clear()

    def clear(self, *, unseen: int = 0) -> None:
        """Drop every capture, `unseen` of which nobody was told of; their memory goes back."""
        self._budget.counters.add("captures_dropped", len(self._captures) - unseen)
        self._captures.clear()
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.release()

    def _record(self, work: Work, inputs: Sequence[torch.Tensor], like: torch.Tensor) -> Capture:
        if self._recorder is None:
            self._recorder = self._budget.recorder(inputs[0].device)
        recorder = self._recorder
        before = recorder.used_bytes()
        buffers = self._buffers_for([*inputs, like], inputs[0].device)
        output = buffers.pop()
        torch._foreach_copy_(buffers, list(inputs))

        def work_on_buffers() -> None:
            output.copy_(work.function(buffers))

        replay = recorder.record(work_on_buffers)
        replay()  # takes the memory that it will hold, and shows now what cannot run
        nbytes = max(0, recorder.used_bytes() - before)
        return Capture(buffers, output, replay, work.keep(), nbytes)

    def _buffers_for(
        self, tensors: Sequence[torch.Tensor], device: torch.device
    ) -> list[torch.Tensor]:
        """A buffer of its own for each of `tensors`, shared with other captures of the pool."""
        counts: dict[Hashable, int] = {}
        found = []
        for tensor in tensors:
            spec = (tensor.shape, tensor.dtype, tensor.stride())
            counts[spec] = counts.get(spec, 0) + 1
            name = (spec, counts[spec])
            buffer = self._buffers.get(name)
            if buffer is None:
                # Normal tensors can be written in inference mode and out of it.
                with torch.inference_mode(False):
                    buffer = torch.empty_like(tensor, device=device)
                self._buffers[name] = buffer
            found.append(buffer)
        return found


_MOST_RECORDINGS = 2
"""Of one key in a run. Two forms that do not fit together would drop each other at each step."""


class Replayer:
    """Runs work launch by launch the first time in a run, and from its capture after that."""

    def __init__(self, pool: CapturePool, *, strict: bool) -> None:
        self.reasons: set[str] = set()
        self._pool = pool
        self._strict = strict
        self._forms: dict[Hashable, torch.Tensor | None] = {}  # of results; None: never record
        self._waited: dict[Hashable, int] = {}
        self._recorded: Counter[Hashable] = Counter()
        self._replayed: set[Hashable] = set()

    def begin_run(self) -> None:
        """Where it is kept over runs: what was replayed before it was dropped is recorded again."""
        for key in self._replayed:
            del self._recorded[key]
        self._replayed.clear()

    def replay(self, key: Hashable, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Replay what was captured as `key`, if it was."""
        capture = self._pool.get(key)
        if capture is None:
            return None
        self._replayed.add(key)
        return capture(inputs)

    def never(self, key: Hashable) -> bool:
        """Whether it is known that `key` cannot be captured in this run."""
        return key in self._forms and self._forms[key] is None

    def __call__(self, key: Hashable, work: Work, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what `work` gives for `inputs`, by a capture where there is or can be one.

        Raises:
            CaptureFailed: when strict, unless memory was what was missing.
        """
        result = self.replay(key, inputs)
        if result is not None:
            return result
        form = self._forms.get(key)
        if form is not None and self._recorded[key] == _MOST_RECORDINGS:
            # Recording at every step would cost more than it gives.
            self._never(key, "captures of this run do not fit into BLADE_CAPTURE_MIB together")
        elif form is not None:
            self._recorded[key] += 1
            try:
                return self._pool.record(key, work, inputs, form)(inputs)
            except CaptureFailed as error:
                if self._strict and not error.transient:
                    raise
                self._never(key, str(error))
                warn_once(f"Blade runs on without a CUDA graph: {error}.")
        if key in self._forms:
            return work.function(inputs)
        with self._pool.waits() as waits:
            result = work.function(inputs)
        if work.not_yet():
            return result
        reason = self._pool.refused(key) or work.why_not()
        if reason is None and waits:
            # The call that compiles waits for the GPU to check the new graphs; the next may not.
            self._waited[key] = self._waited.get(key, 0) + 1
            if self._waited[key] == 1:
                return result
            reason = "it waits for the GPU: " + waits[0]
        if reason is None:
            self._forms[key] = torch.empty_like(result, device="meta")
        else:
            self._never(key, reason)
        return result

    def _never(self, key: Hashable, reason: str) -> None:
        self._forms[key] = None
        self.reasons.add(reason)


class CaptureBudget:
    """Bounds what all pools of a process hold; the least recently used goes first."""

    def __init__(
        self,
        counters: Counters,
        recorder: type[Recorder],
        nbytes: int | None = None,
    ) -> None:
        self.counters = counters
        self.recorder = recorder
        self._nbytes = nbytes
        self.clock = itertools.count(1)
        self.pools: weakref.WeakSet[CapturePool] = weakref.WeakSet()

    def usable(self, device: torch.device) -> bool:
        return self._nbytes != 0 and self.recorder.usable(device)

    @property
    def nbytes(self) -> int:
        if self._nbytes is None:  # asked for only where there is a GPU
            device = torch.cuda.current_device()
            self._nbytes = torch.cuda.get_device_properties(device).total_memory // 8
        return self._nbytes

    def used(self) -> int:
        return sum(pool.nbytes for pool in list(self.pools))

    def exceeded(self) -> bool:
        return self.used() > self.nbytes

    def make_room(self, keep: CapturePool) -> bool:
        """Clear other pools until the budget is kept; return whether it is."""
        others = sorted((p for p in self.pools if p is not keep), key=lambda p: p.last_used)
        for pool in others:
            if not self.exceeded():
                break
            pool.clear()
        return not self.exceeded()

    def too_small(self, nbytes: int) -> str:
        return (
            f"its CUDA graph needs {nbytes / 2**20:.0f} MiB, more than the "
            f"{self.nbytes / 2**20:.0f} MiB that captures may hold. Set BLADE_CAPTURE_MIB to "
            "more, or use a smaller size or batch"
        )
