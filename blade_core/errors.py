"""What can go wrong, by who has to act.

Every message says what failed, what was seen, what was expected, and what to do.
"""

from __future__ import annotations

import errno

import torch


class BladeError(RuntimeError):
    """Base of every error that Blade raises itself."""


class InvalidChoice(BladeError):
    """A node input has a value that Blade does not know."""


class BackendUnavailable(BladeError):
    """The chosen compiler cannot run on this machine; the message holds the exact reason."""


class UnknownStructure(BladeError):
    """A module holds state that no key can describe, so that no graph of it may be shared."""


class WeightsFrozen(BladeError):
    """Weights that are folded into graphs changed, and the user chose not to compile again."""


class CompileFailed(BladeError):
    """A compiler gave up on one graph.

    `transient` failures (memory, disk) are tried again in the next run; all others are
    remembered with the graph's key and never tried twice in a process.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotPrivate(BladeError):
    """Code would be run from a folder that other users may write to."""


class CaptureFailed(BladeError):
    """Work could not be recorded as a CUDA graph; it runs launch by launch.

    `transient` failures (memory) are nobody's fault and never stop a prompt.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class LoraError(BladeError):
    """A LoRA cannot be used as asked; the message names the file."""


class ControlNetError(BladeError):
    """A ControlNet does not fit the model, or its control image does not fit the ControlNet."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a lack of device or host memory."""
    # torch.OutOfMemoryError by the name that torch 2.0, where torch_blade lives, has too.
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return any(
        isinstance(e, kinds)
        or (isinstance(e, RuntimeError) and "CUDA error: out of memory" in str(e))
        for e in _chain(error)
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a full disk or a used-up quota."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    return any(
        (isinstance(e, OSError) and e.errno in full) or "No space left on device" in str(e)
        for e in _chain(error)
    )


def is_cancel(error: BaseException) -> bool:
    """A user's cancel is a plain Exception on hosts before 0.20; only its name tells it."""
    return type(error).__name__ == "InterruptProcessingException"


def first_line(error: BaseException) -> str:
    """Type and first line of `error`: compilers append pages of generated code."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
