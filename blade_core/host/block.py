"""One block of a model: runs its units' graphs, or leaves it to the host's code with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends import Backend
from ..capture import Replayer, Work
from ..config import OptimizeConfig
from ..counters import Counters
from ..engine import Engine
from ..errors import CompileFailed, UnknownStructure, WeightsFrozen, is_out_of_memory
from ..graph import Graph, GraphRequest, Positional, Static, skeleton
from ..key import GraphKey, TensorSpec, digest
from ..log import warn_once
from ..structure import describe, modules_of, reads_training
from .blocks import Step
from .projections import Projection, Projections
from .step import not_capturable
from .weights import HOST_STATE, Slot, UnitWeights, checksum, in_format, parameter_slots

Signature = tuple[Any, ...]

_FEW = 4
"""Missing graphs below which starting other processes takes longer than it saves."""

_PATIENCE_SECONDS = 0.25
"""How long a call may trace for the background: a step of a UNet without Blade takes no less."""

_COMPILING = "its graphs are being compiled"


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
    """When, on the monotonic clock, this call has traced enough for them."""
    pieces: Replayer | None = None
    """Captures blocks one by one in this call, because the call as a whole cannot be."""
    cut: str | None = None
    """Why what ran in this call cannot be captured."""

    def begin_call(self) -> None:
        self.pieces = self.cut = None
        self.pending = False
        self.patience = time.monotonic() + _PATIENCE_SECONDS

    def out_of_patience(self) -> bool:
        return time.monotonic() > self.patience


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

    def begin(self, device: torch.device, dtype: torch.dtype, run: RunContext) -> str | None:
        """Take up the weights as they are now; return why the unit cannot run compiled."""
        self.graphs.clear()
        if run.config.compile == "background":
            self._asked.clear()
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
        inputs = []
        signature: list[Any] = []
        for value in args:
            if isinstance(value, torch.Tensor):
                tensor = in_format(value, run.memory_format)
                inputs.append(tensor)
                signature += (tensor.shape, tensor.dtype)
            else:
                signature.append(value)
        key = tuple(signature)
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
                self._asked.get(signature) == engine.jobs.finished or run.out_of_patience()
            ):
                return None
            if background or signature not in self._asked:
                least = 1 if background else _FEW
                ask = partial(engine.soon, least=least, beside=run.beside)
                self._asked[signature] = engine.jobs.finished
        request = partial(self._request, key, call, run)
        return ask(key, backend, request, checkpoint=run.checkpoint, announce=run.announce)

    def _key(self, backend: Backend, call: Call, run: RunContext) -> GraphKey:
        specs = iter([TensorSpec.of(t) for t in call.inputs])
        return GraphKey(
            structure=self.structure,
            signature=tuple(next(specs) if isinstance(a, torch.Tensor) else a for a in call.args),
            layout=digest(tuple(TensorSpec.of(w) for w in call.weights)),
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


class OptimizedBlock:
    """A block, its units, and what became of it in the last run."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name = name
        self.block = block
        self.units: list[Unit] = []
        self.why_not: str | None = None  # for the whole run
        self._unreadable: str | None = None  # for as long as the block does not change
        self.reasons: set[str] = set()  # why calls of this run were eager
        self.compiled_calls = 0
        self._pending = False  # units of the last call ran uncompiled
        self.changes = 0  # how often it was read anew
        self._frozen_keys: list[dict[Signature, GraphKey]] = []
        self._seen: list[tuple[nn.Module, dict[str, Any]]] = []

    def _program(self) -> list[Step] | str:
        """The block's steps as it is now, or why it can only run as stock."""
        raise NotImplementedError

    def read(self) -> None:
        """Look at the block anew: packs inject layers, hooks and patches between runs."""
        if self._changed():
            self.changes += 1
            self._unreadable = self._read_program()

    def begin(self, device: torch.device, dtype: torch.dtype, run: RunContext) -> None:
        """Take up the weights as they are in this run."""
        self.reasons = set()
        self.compiled_calls = 0
        self.why_not = self._unreadable or self._prepare(device, dtype, run)

    def forget(self) -> None:
        """Read the block anew in the next run: code that it may use has changed."""
        self._seen = []

    def end(self, counters: Counters) -> None:
        if self.compiled_calls:
            counters.add("blocks_compiled")
        if self.reasons:
            counters.add("blocks_eager")
        for unit in self.units:
            unit.end()

    def slots(self) -> list[Slot]:
        """Where its layers hold their weights."""
        if not self.units:
            return parameter_slots(modules_of(self.block))
        projected = [layer for projection in self.projections() for layer in projection.layers]
        slots = [slot for unit in self.units for slot in unit.weights.slots()]
        return slots + parameter_slots(projected)

    def projections(self) -> list[Projection]:
        return [unit.step.projection for unit in self.units if unit.step.projection is not None]

    def attempt(
        self,
        tensors: dict[str, torch.Tensor],
        statics: dict[str, Any],
        reason: str | None,
        run: RunContext,
    ) -> torch.Tensor | None:
        """Run the units, or return None: then the host's own code has to run.

        tensors, statics: what the steps read (blocks.py), by name.
        reason: why the units cannot run in this call, if that is known.
        """
        reason = self.why_not or reason
        if reason is None:
            try:
                return self._run(tensors, statics, run)
            except WeightsFrozen:
                raise
            except CompileFailed as error:
                if run.config.strict:
                    raise
                reason = self.why_not = str(error)
                warn_once(f"{error} Blocks that need it run uncompiled.")
            except RuntimeError as error:
                # Out of memory is for the host, which frees memory and tries again.
                if run.config.strict or is_out_of_memory(error):
                    raise
                reason = self.why_not = f"its graph failed: {error}"
                warn_once(f"{self.name} runs uncompiled: {reason}")
        self.reasons.add(reason)
        run.cut = f"{self.name} runs uncompiled"
        return None

    def _run(
        self, tensors: dict[str, torch.Tensor], statics: dict[str, Any], run: RunContext
    ) -> torch.Tensor:
        def compute(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return self._compute(dict(zip(tensors, values, strict=True)) | statics, run)

        values = list(tensors.values())
        if run.pieces is None:
            result = compute(values)
        else:
            key = (self.name, *statics.values(), *[(t.shape, t.dtype) for t in values])
            work = Work(compute, self._why_not_captured, self._graphs_in_use, lambda: run.pending)
            result = run.pieces(key, work, values)
        if self._pending:
            self.reasons.add(_COMPILING)
        else:
            self.compiled_calls += 1
        return result

    def _compute(self, values: dict[str, Any], run: RunContext) -> torch.Tensor:
        # A piece is a capture of its own: it keeps nothing from one replay to the next.
        project = run.projections if run.pieces is None else Projection.__call__
        others_pending, run.pending = run.pending, False
        for unit in self.units:
            step = unit.step
            arguments = step.arguments(values, project)
            values[step.writes] = unit(arguments, run)
        self._pending = run.pending
        run.pending |= others_pending
        if run.cut is None:
            run.cut = self._why_not_captured()
        result = values["h"]
        assert isinstance(result, torch.Tensor)
        return result

    def _why_not_captured(self) -> str | None:
        for unit in self.units:
            projection = unit.step.projection
            layers = () if projection is None else projection.layers
            reason = unit.why_not_captured() or not_capturable(layers, unit.weights.device)
            if reason is not None:
                return f"{self.name}: {reason}"
        return None

    def _graphs_in_use(self) -> Any:
        return [unit.graphs.copy() for unit in self.units]

    def _changed(self) -> bool:
        """Whether a module was replaced or a plain attribute changed since the last run.

        Comparing is cheaper than reading the program anew. Attributes are compared as the
        dicts they are in; weights are looked at by `_prepare`, run by run.
        """
        modules = modules_of(self.block)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        same = not hooked and len(modules) == len(self._seen)
        with suppress(RuntimeError):  # tensors as attributes have no truth value
            if same and all(
                m is seen and vars(m) == attributes
                for m, (seen, attributes) in zip(modules, self._seen, strict=True)
            ):
                return False
        self._seen = [] if hooked else [(m, dict(vars(m))) for m in modules]
        return True

    def _read_program(self) -> str | None:
        steps = self._program()
        if isinstance(steps, str):
            self.units = []
            return steps
        if len(self._frozen_keys) != len(steps):
            self._frozen_keys = [{} for _ in steps]
        try:
            self.units = [
                Unit(step, keys) for step, keys in zip(steps, self._frozen_keys, strict=True)
            ]
        except UnknownStructure as error:
            self.units = []
            return str(error)
        return None

    def _prepare(self, device: torch.device, dtype: torch.dtype, run: RunContext) -> str | None:
        for unit in self.units:
            reason = unit.begin(device, dtype, run)
            if reason is not None:
                return reason
        return None

    def report(self) -> dict[str, Any]:
        """What the last run did with this block."""
        if self.compiled_calls and self.reasons:
            state = "mixed"
        elif self.compiled_calls:
            state = "compiled"
        else:
            state = "eager" if self.reasons else "idle"
        return {
            "block": self.name,
            "state": state,
            "reasons": sorted(self.reasons),
            "layers": [unit.step.label for unit in self.units],
        }
