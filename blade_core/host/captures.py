"""The captures of one model: what they were recorded over, and when they go."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..capture import CaptureBudget, CapturePool, Replayer
from .projections import Projections
from .step import not_capturable
from .weights import when_freed

_states = itertools.count(1)
"""Numbers for all that is baked into captures of a model: no two are ever the same."""


class ModelCaptures:
    """Holds no reference to the model, and none to the runs in which its calls are recorded."""

    replayer: Replayer | None = None
    """Of this run; None where nothing is to be captured."""
    why_not: str | None = None
    """Why no call of this run can be one capture, if that is known."""
    replays = 0
    """Of calls as a whole, in this run."""
    state = 0
    """A number for all that is baked into the captures."""

    def __init__(self, budget: CaptureBudget, *, strict: bool, over_runs: bool) -> None:
        """over_runs: keep what a run's calls told for the next run."""
        self.pool = CapturePool(budget)
        self.projections = Projections()
        self._strict = strict
        self._over_runs = over_runs
        self._baked: tuple[Any, ...] = ()
        self._stream = 0
        self._forgotten = 0
        self._guard: weakref.ref[Any] | None = None
        self._elsewhere: set[tuple[weakref.ref[CapturePool], Hashable]] = set()
        # With the model goes what other models have captured of it.
        weakref.finalize(self, _discard, self._elsewhere).atexit = False

    def begin(
        self, device: torch.device, outer: Sequence[nn.Module], *, wanted: bool, forgotten: int
    ) -> None:
        """A run begins.

        outer: what no block holds, and a capture of a whole call would run.
        forgotten: another number when a graph has to be compiled or loaded again, which cannot be
            done while recording, so that calls have to be launched first.
        """
        known = self.replayer if self._over_runs and forgotten == self._forgotten else None
        self._forgotten = forgotten
        self.replayer = None
        self.why_not = None
        self.replays = 0
        if wanted and self.pool.usable(device):
            self.why_not = not_capturable(outer, device)
            self.replayer = known or self._new_replayer()
            self.replayer.begin_run()

    def still_fit(
        self, device: torch.device, baked: tuple[Any, ...], weights: torch.Tensor
    ) -> bool:
        """Whether all that is baked into them is as it was; else they have to be dropped.

        weights: the first of the model's tensors; when it is freed, they go, too.
        """
        self._stream = _stream(device)
        baked = (device, self._stream, *baked)
        guarded = self._guard is None or self._guard() is not None  # it calls back only once
        if baked == self._baked and guarded:
            return True
        self._baked = baked
        self.state = next(_states)
        if self.replayer is not None:
            self.replayer = self._new_replayer()
        drop = partial(_drop, self.pool, self.projections, self._elsewhere)
        self._guard = when_freed(weights, drop)
        return False

    def usable(self, device: torch.device) -> bool:
        """Whether a call on `device` may be captured now."""
        return self.replayer is not None and self.pool.usable(device)

    def moved(self, device: torch.device) -> bool:
        """Whether calls come from another stream than the one that they were recorded for."""
        return self.replayer is not None and _stream(device) != self._stream

    def held_by(self, other: ModelCaptures, signature: Hashable) -> None:
        """`other` has captured this model's work as `signature`: that goes with these."""
        if other.pool.get(signature) is not None:
            self._elsewhere.add((weakref.ref(other.pool), signature))

    def drop(self) -> None:
        """Drop them, those of other models that hold this one's work, and what they work with."""
        _drop(self.pool, self.projections, self._elsewhere)

    def report(self) -> dict[str, Any]:
        """What there is, and what was done in the last run."""
        return {
            "captures": len(self.pool),
            "capture_mib": round(self.pool.nbytes / 2**20, 1),
            "replays": self.replays,
            "not_captured": sorted(self.replayer.reasons) if self.replayer else [],
        }

    def _new_replayer(self) -> Replayer:
        return Replayer(self.pool, strict=self._strict)


def _drop(
    pool: CapturePool,
    projections: Projections,
    elsewhere: set[tuple[weakref.ref[CapturePool], Hashable]],
) -> None:
    projections.clear()  # first: the pool gives the device what is free by then
    pool.clear()
    _discard(elsewhere)


def _discard(elsewhere: set[tuple[weakref.ref[CapturePool], Hashable]]) -> None:
    while elsewhere:
        other, signature = elsewhere.pop()
        found = other()
        if found is not None:
            found.discard(signature)


def _stream(device: torch.device) -> int:
    """The stream that work for `device` is launched on now; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
