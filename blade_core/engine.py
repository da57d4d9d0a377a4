"""From a key to a graph: look up, compile, check, or say why not. The one state machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .backends import BACKENDS, Backend
from .backends.inductor import InductorBackend
from .cache import WAIT_SECONDS, GraphCache
from .check import difference_of, tolerance
from .choose import usable_backends
from .config import OptimizeConfig, graph_cache_bytes, own_kernels
from .counters import Counters
from .early import EarlyGraphs
from .errors import (
    CompileFailed,
    NotPrivate,
    first_line,
    is_cancel,
    is_disk_full,
    is_out_of_memory,
)
from .graph import Graph, GraphFunction, GraphRequest
from .jobs import Jobs
from .key import GraphKey
from .log import logger, warn_once
from .pool import Result
from .preload import Preload
from .store import GraphStore

_LATELY_SECONDS = 7 * 24 * 3600.0


class Engine:
    """Owns the graph cache, the counters and the compilers of a process."""

    def __init__(self, *, budget: int | None = None, store: tuple[Path, int] | None = None) -> None:
        """budget: bytes of graphs in memory. store: where graphs are kept on disk, and of how many
        bytes; None for nowhere."""
        self.counters = Counters()
        self.cache = GraphCache(graph_cache_bytes() if budget is None else budget, self.counters)
        self.store = GraphStore(*store, self.counters) if store is not None else None
        # Inductor and torch_blade keep global state while they compile.
        self._compiling = threading.Lock()
        self.jobs = Jobs(self.store)
        self._preload = Preload()
        self.early = EarlyGraphs(self._compiling)

    def backends(self, config: OptimizeConfig, device: torch.device) -> tuple[Backend, ...]:
        """`usable_backends`, once the compiler is imported if that has begun."""
        self._preload.wait()
        return usable_backends(config, device)

    def started(self, device: torch.device) -> None:
        """The process has started. Graphs that were used lately are going to be needed again: the
        compiler is imported, and for a GPU they are loaded, while nobody waits. (For a CPU,
        torch compiles much of what it loads once more.)"""
        if self.store is not None and self.store.used_within(_LATELY_SECONDS):
            self._preload.start(BACKENDS["inductor"])
            if device.type == "cuda":
                backend = InductorBackend(own_kernels())
                self.early.start(self.store, backend, device, self._preload.wait)

    def expect(self, config: OptimizeConfig, device: torch.device) -> None:
        """A model is going to run on `device`: the compiler is imported while the host still loads
        it. Where no graph was ever made, all of them will be missing, and other processes get
        ready, too; if nobody waits for those, the first image does not need a compiler here."""
        made = len(self.cache) or (self.store is not None and self.store.stored().graphs)
        if config.backend in ("auto", "inductor"):
            if not made and self.jobs.pays(device):
                self.jobs.start(device)
            if made or config.compile != "background":
                self._preload.start(BACKENDS["inductor"])

    def graph(
        self,
        key: GraphKey,
        backend: Backend,
        request: Callable[[], GraphRequest],
        *,
        checkpoint: Callable[[], None],
        announce: Callable[[GraphKey], None],
    ) -> Graph:
        """Return the graph of `key`, loaded or compiled now if this process never did.

        request: makes the request; called only to load or to compile.
        checkpoint: called before compiling and while waiting; raises to cancel.
        announce: told the key before it is loaded, compiled, or waited for.

        Raises:
            CompileFailed: with the reason in words.
        """

        def ahead(result: Result, device: torch.device) -> None:
            with self._alone(checkpoint):
                _load_ahead(backend, result, device)

        def build() -> Graph:
            waits = self.jobs.pending(key)
            if waits:
                announce(key)
            self.jobs.wait(key, checkpoint, ahead)
            with self._alone(checkpoint):
                if not waits:
                    announce(key)
                wanted = request()
                return self._load(backend, wanted) or self._compile(backend, wanted)

        return self.cache.get(key, build, checkpoint=checkpoint)

    def soon(
        self,
        key: GraphKey,
        backend: Backend,
        request: Callable[[], GraphRequest],
        *,
        least: int,
        checkpoint: Callable[[], None],
        announce: Callable[[GraphKey], None],
        beside: Callable[[], None],
    ) -> Graph | None:
        """Like `graph`, but None while another process compiles it, or is going to.

        least: how many graphs have to be missing before other processes are worth their start;
            the few that are held until then are compiled here, when `graph` is asked for them.
        beside: called when one more is left to them.

        Raises:
            CompileFailed: with the reason in words.
        """
        with self._alone(checkpoint):
            if self.jobs.pending(key):
                self.jobs.begin(least=least)  # it may be held by who wanted more of them
                return None
            new = key not in self.cache and key not in self.jobs
            if new and (self.store is None or key not in self.store):
                wanted = request()
                job = _job(backend, wanted)
                if job is not None:
                    beside()
                    self.jobs.add(key, backend.name, job, wanted.device, least=least)
                    return None
        if key in self.jobs:  # done: taking it over is nothing to tell
            return self.graph(key, backend, request, checkpoint=checkpoint, announce=_nothing)
        return self.graph(key, backend, request, checkpoint=checkpoint, announce=announce)

    @contextmanager
    def _alone(self, checkpoint: Callable[[], None]) -> Iterator[None]:
        """Tracing and compiling change global state of torch."""
        while not self._compiling.acquire(timeout=WAIT_SECONDS):
            checkpoint()
        try:
            checkpoint()
            yield
        finally:
            self._compiling.release()

    def _load(self, backend: Backend, request: GraphRequest) -> Graph | None:
        """The graph that another process made, now or at an earlier time; None if there is none
        that does what it should."""
        key, start = request.key, time.perf_counter()
        made = self.jobs.take(key)
        if made is not None:
            call = self._checked(
                backend, request, lambda: made.call or backend.load(made.artifact, request)
            )
            if call is not None:
                seconds = made.seconds + time.perf_counter() - start
                self._note_compiled(key, seconds)
                return Graph(key, call, len(made.artifact), seconds, backend.capturable)
        elif self.store is not None and key.frozen is None:
            load, nbytes = self._stored(self.store, backend, request)
            call = None if load is None else self._checked(backend, request, load)
            if call is not None:
                seconds = time.perf_counter() - start
                self.counters.add("graphs_loaded")
                self.counters.add_load_seconds(seconds)
                logger.debug("loaded in %.2f s: %s", seconds, key)
                return Graph(key, call, nbytes, seconds, backend.capturable)
        return None

    def _stored(
        self, store: GraphStore, backend: Backend, request: GraphRequest
    ) -> tuple[Callable[[], GraphFunction] | None, int]:
        """How to load what is on disk, and how many bytes it has."""
        early = self.early.take(request.key)
        if early is not None:
            store.touch(request.key)
            return (lambda: early.call), early.nbytes
        artifact = store.read(request.key)
        if artifact is None:
            return None, 0
        return partial(backend.load, artifact, request), len(artifact)

    def _checked(
        self, backend: Backend, request: GraphRequest, load: Callable[[], GraphFunction]
    ) -> GraphFunction | None:
        """What `load` gives, if it does what the request's module does."""
        # Not among what follows: that the host's own layers fail tells nothing of a graph.
        expected = request.eager(request.weights, request.inputs)
        try:
            call = load()
            difference = difference_of(call, request, expected)
        except NotPrivate as error:
            warn_once(str(error))
            return None
        except Exception as error:  # whatever unpickling raises
            if is_cancel(error):
                raise
            if is_out_of_memory(error) or is_disk_full(error):
                raise _failure(backend.name, request, error) from error
            if isinstance(error, OSError):  # of a folder that it is unpacked into
                warn_once(f"Blade cannot load compiled graphs: {first_line(error)}")
                return None
            logger.debug("%s cannot be loaded", request.key, exc_info=True)
            reason = first_line(error)
        else:
            if difference is None:
                return call
            reason = f"its result differs by {difference:.1e}"
        if self.store is not None:
            self.store.drop(request.key, reason)
        return None

    def _note_compiled(self, key: GraphKey, seconds: float) -> None:
        self.counters.add("graphs_compiled")
        self.counters.add_compile_seconds(seconds)
        logger.info("compiled in %.1f s: %s", seconds, key)

    def _compile(self, backend: Backend, request: GraphRequest) -> Graph:
        start = time.perf_counter()
        expected = request.eager(request.weights, request.inputs)
        try:
            compiled = backend.compile(request)
            difference = difference_of(compiled.call, request, expected)
        except CompileFailed:
            raise
        except Exception as error:  # whatever a compiler raises, stock ComfyUI would not have
            if is_cancel(error):
                raise
            raise _failure(backend.name, request, error) from error
        seconds = time.perf_counter() - start
        if difference is not None:
            raise CompileFailed(
                f"The graph that {backend.name} built for {request.key.label} differs from the "
                f"uncompiled layer by {difference:.1e} (relative RMS), expected at most "
                f"{tolerance(request.inputs[0]):.0e}; it is not used."
            )
        self._note_compiled(request.key, seconds)
        if self.store is not None and compiled.artifact is not None and not request.frozen:
            self.store.write(request.key, compiled.artifact)
        return Graph(request.key, compiled.call, compiled.nbytes, seconds, backend.capturable)


def _job(backend: Backend, request: GraphRequest) -> bytes | None:
    """The request for another process; None where it cannot travel, so that this one compiles it,
    and says what is wrong if that is no better."""
    try:
        return backend.job(request)
    except Exception as error:  # whatever tracing and pickling raise
        if is_cancel(error) or is_out_of_memory(error):
            raise
        logger.debug("%s cannot travel", request.key, exc_info=True)
        return None


def _load_ahead(backend: Backend, result: Result, device: torch.device) -> None:
    """A graph that is going to be asked for soon."""
    if isinstance(backend, InductorBackend):  # others need the request
        try:
            result.call = backend.load_for(device, result.artifact)
        except Exception as error:  # whatever unpickling raises: who asks for it will say so
            if is_cancel(error):
                raise
            logger.debug("a graph cannot be loaded ahead", exc_info=True)


def _nothing(_: GraphKey) -> None:
    """There is nobody to tell."""


def _failure(backend: str, request: GraphRequest, error: Exception) -> CompileFailed:
    label = request.key.label
    if is_out_of_memory(error):
        return CompileFailed(
            f"Out of memory while {backend} compiled {label}. Free VRAM (smaller batch or size, "
            "fewer models) or choose backend eager; Blade tries again in the next run.",
            transient=True,
        )
    if is_disk_full(error):
        return CompileFailed(
            f"The disk filled up while {backend} compiled {label} ({first_line(error)}). Free "
            "space in the temporary folder or set TORCHINDUCTOR_CACHE_DIR to another disk; "
            "Blade tries again in the next run.",
            transient=True,
        )
    return CompileFailed(f"{backend} could not compile {label}: {first_line(error)}")
