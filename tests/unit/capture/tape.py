"""What the tests of captures share: a recorder that says what it was asked for, and work for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from blade_tests.host.recorder import TapeRecorder

from blade.blade_core.capture import CapturePool, Function, Work

MIB = 2**20


class InterruptProcessingException(Exception):
    """A user's cancel, by the host's own name for it."""


class Tape(TapeRecorder):
    """A recorder of one test's own: the test says what it meets, and sees what was done."""

    usable_now = True
    waiting: tuple[str, ...] = ()
    error: BaseException | None = None
    replay_error: BaseException | None = None
    made: list[Tape]
    recordings: int
    releases: int
    at_release: Callable[[], None]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.made.append(self)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        type(self).recordings += 1
        if self.error is not None:
            raise self.error
        replay = super().record(function)

        @torch.inference_mode()  # the tape writes what it kept, whatever mode that was made in
        def checked() -> None:
            if self.replay_error is not None:
                raise self.replay_error
            replay()

        return checked

    def release(self) -> None:
        type(self).releases += 1
        type(self).at_release()
        super().release()


class Counted:
    """A function that counts how often Python ran it."""

    def __init__(self, function: Function) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return self._function(inputs)


def double(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return inputs[0] * 2


def nothing() -> None:
    return None


def work_of(
    function: Function = double,
    why_not: Callable[[], str | None] = nothing,
    keep: Callable[[], Any] = nothing,
) -> Work:
    return Work(function, why_not, keep)


def ones(value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((2, 3), value)]


def capture(pool: CapturePool, key: Hashable = "a", work: Work | None = None) -> None:
    """Put one capture into `pool`."""
    pool.record(key, work or work_of(), ones(), torch.empty(2, 3, device="meta"))


class Graphs:
    """Something that the kernels use."""
