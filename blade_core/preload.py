"""Importing the compiler while the host still loads models: seconds that nobody waits for then."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .backends import Backend
from .log import logger

_TURN_SECONDS = 2e-4
"""How long a thread may compute while another waits for its turn. Loading a model is thousands of
calls that leave Python and come back: with Python's 5 ms each, it would wait for the whole import.
"""


class Preload:
    """A thread that imports a compiler, once a process.

    Nobody else may import parts of the same packages meanwhile (Python calls two threads that
    need each other's half-imported modules a deadlock), so whoever needs a compiler waits first.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, backend: Backend) -> None:
        """Import what `backend` needs, unless that was asked for before."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_preload, args=(backend,), name="blade-import", daemon=True
            )
            self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being imported any more."""
        if self._thread is not None:
            self._thread.join()


def _preload(backend: Backend) -> None:
    try:
        with _short_turns(), _young_garbage_only():
            backend.preload()
    except Exception:  # whatever a package raises; who needs the compiler meets it again
        logger.debug("%s cannot be imported beforehand", backend.name, exc_info=True)


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _TURN_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """An import makes so many objects that Python looks through all of the host's, too, again and
    again: a sixth of its time."""
    if gc.get_freeze_count():  # somebody else's choice, which could not be given back
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
