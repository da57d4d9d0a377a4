"""Importing the compiler while the host still loads models: seconds that nobody waits for then."""

from __future__ import annotations

import threading

from .backends import Backend
from .log import logger


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
        backend.preload()
    except Exception:  # whatever a package raises; who needs the compiler meets it again
        logger.debug("%s cannot be imported beforehand", backend.name, exc_info=True)
