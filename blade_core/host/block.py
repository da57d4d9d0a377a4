"""One block of a model: runs its units' graphs, or leaves it to the host's code with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..capture import Work
from ..counters import Counters
from ..errors import CompileFailed, UnknownStructure, WeightsFrozen, is_out_of_memory
from ..key import GraphKey
from ..log import warn_once
from ..structure import modules_of
from .blocks import Step
from .joined import attentions
from .projections import Projection
from .step import not_capturable
from .unit import RunContext, Signature, Unit
from .weights import Slot, parameter_slots

_COMPILING = "its graphs are being compiled"


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
        self.attentions: list[nn.Module] = []
        self._frozen_keys: list[dict[Signature, GraphKey]] = []
        self._seen: list[tuple[nn.Module, dict[str, Any], list[type]]] = []

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

    def containers(self) -> list[nn.Module]:
        """Its modules that hold others: on these packs set a `forward` or hooks."""
        return [module for module, *_ in self._seen if module._modules]

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
                m is seen and vars(m) == attributes and _kinds(m) == kinds
                for m, (seen, attributes, kinds) in zip(modules, self._seen, strict=True)
            ):
                return False
        self._seen = [] if hooked else [(m, dict(vars(m)), _kinds(m)) for m in modules]
        self.attentions = attentions(modules)
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


def _kinds(module: nn.Module) -> list[type]:
    """What its weights are: None, tensors, or a quantization's. The dict of them stays the same."""
    return [*map(type, module._parameters.values())]
