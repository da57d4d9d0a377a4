"""Graphs that an earlier process used last, loaded while nobody waits for them.

A server that has just started is idle until somebody has opened its page and queued a prompt.
Whoever asks for one of these graphs then takes it; what nobody asks for stays, within a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .backends.inductor import InductorBackend
from .graph import GraphFunction
from .key import GraphKey, is_for
from .log import logger
from .store import GraphStore

_MOST = 64
_SECONDS = 3600.0
"""How many graphs, and how long before the last of them they were asked for: those of a UNet, a
VAE and another size, and not what was tried on other days."""


class Early(NamedTuple):
    """A graph that nobody has asked for yet; `key` is the text of its key."""

    key: str
    call: GraphFunction
    nbytes: int


class EarlyGraphs:
    """What a thread has loaded, one graph at a time under `alone`."""

    def __init__(self, alone: threading.Lock) -> None:
        self._alone = alone
        self._graphs: dict[str, Early] = {}
        self._asked: set[str] = set()
        self._thread: threading.Thread | None = None
        self._ended = False

    def __len__(self) -> int:
        return len(self._graphs)

    def start(
        self,
        store: GraphStore,
        backend: InductorBackend,
        device: torch.device,
        ready: Callable[[], None],
    ) -> None:
        """Load from `store` what `backend` can run on `device`, once `ready` returns; once a
        process."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._load,
                args=(store, backend, device, ready),
                name="blade-load",
                daemon=True,
            )
            self._thread.start()

    def take(self, key: GraphKey) -> Early | None:
        """The graph of `key`, if it is there already; it is not going to be loaded any more."""
        self._asked.add(key.id)
        found = self._graphs.pop(key.id, None)
        return found if found is not None and found.key == key.text else None

    def clear(self) -> None:
        """Forget what was loaded, and load no more."""
        self._ended = True
        with self._alone:
            self._graphs.clear()

    def wait(self) -> None:
        """Return when nothing is being loaded any more."""
        if self._thread is not None:
            self._thread.join()

    def _load(
        self,
        store: GraphStore,
        backend: InductorBackend,
        device: torch.device,
        ready: Callable[[], None],
    ) -> None:
        ready()
        if device.type == "cuda":
            torch.empty(0, device=device).new_zeros(1)  # a new thread has no context of the GPU
        count, start = 0, time.perf_counter()
        for id, key, artifact in store.latest(_MOST, _SECONDS):
            if not is_for(key, backend.fingerprint(), device):
                continue
            with self._alone:
                if self._ended:
                    return
                if id in self._asked:
                    continue
                try:
                    call = backend.load_for(device, artifact)
                except Exception:  # whatever unpickling raises; who needs it will say so
                    logger.debug("%s cannot be loaded early", id, exc_info=True)
                    continue
                self._graphs[id] = Early(key, call, len(artifact))
                count += 1
        if count:
            seconds = time.perf_counter() - start
            logger.info("%d graphs of last time loaded in %.1f s", count, seconds)
