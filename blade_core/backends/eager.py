"""The reference: the traced graph, run operation by operation by torch itself.

No faster than stock; it shows whether a difference comes from tracing or from a compiler, and
it tests the state machine in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graph import Compiled, GraphFunction, GraphRequest, dump, trace, undump


class EagerBackend:
    name = "eager"
    channels_last = True
    capturable = True

    def available(self, device: torch.device) -> str | None:
        return None

    def preload(self) -> None:
        """There is nothing to compile with."""

    def joins(self, device: torch.device) -> bool:
        return False

    def fingerprint(self) -> str:
        return "eager"

    def compile(self, request: GraphRequest) -> Compiled:
        module = trace(request)
        artifact = dump(module)
        nbytes = len(artifact)
        if request.frozen:
            nbytes += sum(w.nbytes for w in request.weights)
        return Compiled(_function(module, request), artifact, nbytes)

    def job(self, request: GraphRequest) -> bytes | None:
        return None if request.frozen else dump(trace(request))

    def compile_job(self, job: bytes) -> bytes:
        return job

    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        return _function(undump(artifact), request)


def _function(module: torch.fx.GraphModule, request: GraphRequest) -> GraphFunction:
    forward = module.forward
    if request.frozen:
        frozen = [w.clone() for w in request.weights]  # the live ones may be edited
        return lambda _, inputs: forward(*frozen, *inputs)

    def call(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return forward(*weights, *inputs)

    return call
