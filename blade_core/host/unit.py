"""One unit of a block: its weights and, per signature, its graph; what units of a run share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..backends import Backend
from ..capture import Replayer
from ..config import OptimizeConfig
from ..engine import Engine
from ..errors import CompileFailed
from ..graph import Graph, GraphRequest, Positional, Static, skeleton
from ..key import GraphKey, TensorSpec, digest, layout
from ..log import warn_once
from ..structure import describe, reads_training
from .blocks import Step
from .projections import Projections
from .weights import HOST_STATE, UnitWeights, checksum, in_format

Signature = tuple[Any, ...]

_FEW = 4
"""Missing graphs below which starting other processes takes longer than it saves."""

_PATIENCE_SECONDS = 0.25
"""How long a call may trace for the background: a step of a UNet without Blade takes no less.
What it runs meanwhile does not count, or late blocks would have no turn on a slow machine."""


@dataclass
class RunContext:
    """What all units of a run share."""

    engine: Engine
    config: OptimizeConfig
    backends: tuple[Backend, ...]
    environment: str
    memory_format: torch.memory_format
    weight_format: torch.memory_format
    freeze: bool
    checkpoint: Callable[[], None]
    announce: Callable[[GraphKey], None]
    beside: Callable[[], None]
    bound: Callable[[], None]
    weights_changed: Callable[[], None]
    projections: Projections
    parallel: bool = False
    """Whether other processes compile."""
    pending: bool = False
    """Whether units ran uncompiled in this call, because they do."""
    patience: float = 0.0
    """For how many seconds more this call may trace for them."""
    pieces: Replayer | None = None
    """Captures blocks one by one in this call, because the call as a whole cannot be."""
    cut: str | None = None
    """Why what ran in this call cannot be captured."""

    def begin_call(self) -> None:
        self.pieces = self.cut = None
        self.pending = False
        self.patience = _PATIENCE_SECONDS


class Call(NamedTuple):
    """A call of a unit: its arguments, and the tensors among them in the graph's strides."""

    args: Sequence[Any]
    inputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]


class Unit:
    """One step of a block's program with its weights and, per signature, its graph."""

    def __init__(self, step: Step, frozen_keys: dict[Signature, GraphKey]) -> None:
        self.step = step
        self.weights = UnitWeights(step.unit)
        ignore = HOST_STATE if reads_training(step.unit) else {*HOST_STATE, "training"}
        self.structure = digest(describe(step.unit, ignore=ignore))
        self.graphs: dict[Signature, Graph] = {}
        self._resident: tuple[torch.Tensor, ...] = ()
        self._frozen: str | None = None
        self._frozen_keys = frozen_keys
        self._asked: dict[Signature, int] = {}
        """Graphs that other processes compile, and how many of their jobs had ended when it was
        last asked for."""
        self._cleared = 0

    def begin(self, device: torch.device, dtype: torch.dtype, run: RunContext) -> str | None:
        """Take up the weights as they are now; return why the unit cannot run compiled."""
        self.graphs.clear()
        if run.config.compile == "background" or run.engine.jobs.cleared != self._cleared:
            self._asked.clear()
            self._cleared = run.engine.jobs.cleared
        reason = self.weights.prepare(device, dtype, run.weight_format)
        if reason is None and self.weights.resident:
            self._resident = tuple(self.weights.current())
            self._frozen = digest(checksum(self._resident)) if run.freeze else None
        return reason

    @property
    def frozen(self) -> str | None:
        return self._frozen

    def why_not_captured(self) -> str | None:
        """Why a call of this unit may not be recorded, once it has its graphs."""
        if not self.weights.resident:
            return "its weights are offloaded, or patched while it runs"
        for graph in self.graphs.values():
            if not graph.capturable:
                return f"{graph.key.backend.split(' ')[0]} graphs cannot be captured"
        return None

    def end(self) -> None:
        """Let go of the weights, which the host may free or replace between runs."""
        self.graphs.clear()
        self._resident = ()

    def __call__(self, args: Sequence[Any], run: RunContext) -> torch.Tensor:
        key, inputs = _read(args, run.memory_format)
        graph = self.graphs.get(key)
        if self.weights.resident:
            if graph is None:
                graph = self._bind(key, Call(args, inputs, self._resident), run)
            if graph is not None:
                return graph.call(self._resident, inputs)
        else:
            weights, held = self.weights.resolve()
            try:
                if graph is None:
                    graph = self._bind(key, Call(args, inputs, weights), run)
                if graph is not None:
                    return graph.call(weights, inputs)
            finally:
                self.weights.release(held)
        del inputs  # in other strides they are copies, memory that stock does not take
        run.pending = True
        result: torch.Tensor = self.step.unit(*args)
        return result

    def _bind(self, signature: Signature, call: Call, run: RunContext) -> Graph | None:
        """Take the graph of the first backend that can compile this unit; None while another
        process does."""
        for backend in run.backends:
            key = self._key(backend, call, run)
            old = self._frozen_keys.get(signature, key)
            if old.frozen != key.frozen:
                run.weights_changed()
            try:
                graph = self._ask(signature, key, backend, call, run)
            except CompileFailed as error:
                if error.transient or backend is run.backends[-1]:
                    raise
                warn_once(f"{error} The next compiler is tried.")
                continue
            if graph is None:
                return None
            self._drop_frozen(signature, key, run)
            self.graphs[signature] = graph
            run.bound()
            return graph
        raise AssertionError("a run has at least one backend")

    def _ask(
        self, signature: Signature, key: GraphKey, backend: Backend, call: Call, run: RunContext
    ) -> Graph | None:
        engine = run.engine
        ask: Callable[..., Graph | None] = engine.graph
        if run.parallel and key.frozen is None:
            background = run.config.compile == "background"
            if background and (
                self._asked.get(signature) == engine.jobs.finished or run.patience <= 0
            ):
                return None
            if background or signature not in self._asked:
                least = 1 if background else _FEW
                ask = partial(engine.soon, least=least, beside=run.beside)
                self._asked[signature] = engine.jobs.finished
        request = partial(self._request, key, call, run)
        start = time.monotonic()
        try:
            return ask(key, backend, request, checkpoint=run.checkpoint, announce=run.announce)
        finally:
            run.patience -= time.monotonic() - start

    def _key(self, backend: Backend, call: Call, run: RunContext) -> GraphKey:
        specs = iter([TensorSpec.of(t) for t in call.inputs])
        return GraphKey(
            structure=self.structure,
            signature=tuple(next(specs) if isinstance(a, torch.Tensor) else a for a in call.args),
            layout=layout(call.weights),
            backend=backend.fingerprint(),
            environment=run.environment,
            frozen=self._frozen if self.weights.resident else None,
            label=self.step.label,
        )

    def _request(self, key: GraphKey, call: Call, run: RunContext) -> GraphRequest:
        statics = tuple(None if isinstance(a, torch.Tensor) else Static(a) for a in call.args)
        channels_last = run.memory_format == torch.channels_last
        module = Positional(self.step.unit, statics, channels_last=channels_last)
        return GraphRequest(
            key=key,
            module=skeleton(module, drop=tuple(HOST_STATE)),
            names=tuple(f"unit.{name}" for name in self.weights.names),
            weights=tuple(w.detach() for w in call.weights),
            inputs=tuple(call.inputs),
        )

    def _drop_frozen(self, signature: Signature, key: GraphKey, run: RunContext) -> None:
        """A graph with other weights folded in can never be used again by this unit."""
        old = self._frozen_keys.get(signature)
        if old is not None and old.frozen != key.frozen:
            run.engine.cache.discard(old)
            run.engine.counters.add("frozen_rebuilds")
        if key.frozen is not None:
            self._frozen_keys[signature] = key


def _read(
    args: Sequence[Any], memory_format: torch.memory_format
) -> tuple[Signature, list[torch.Tensor]]:
    """The signature of a call with `args`, and the tensors among them in `memory_format`."""
    inputs: list[torch.Tensor] = []
    signature: list[Any] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            tensor = in_format(value, memory_format)
            inputs.append(tensor)
            signature += (tensor.shape, tensor.dtype)
        else:
            signature.append(value)
    return tuple(signature), inputs
