"""The reference: the traced graph, run operation by operation by torch itself.

No faster than stock; it shows whether a difference comes from tracing or from a compiler, and
it tests the state machine in seconds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress

import torch

from ..graph import Compiled, GraphFunction, GraphRequest, trace


class EagerBackend:
    name = "eager"
    channels_last = True
    capturable = True

    def available(self, device: torch.device) -> str | None:
        return None

    def fingerprint(self) -> str:
        return "eager"

    def compile(self, request: GraphRequest) -> Compiled:
        module = trace(request)
        stream = io.BytesIO()
        torch.save(module, stream)
        artifact = stream.getvalue()
        nbytes = len(artifact)
        if request.frozen:
            nbytes += sum(w.nbytes for w in request.weights)
        return Compiled(_function(module, request), artifact, nbytes)

    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        with suppress(ImportError):  # torch 2.0 has no such module
            # Unpickling a graph asks for it without importing it.
            import torch._higher_order_ops.triton_kernel_wrap
        module = torch.load(io.BytesIO(artifact), weights_only=False)
        return _function(module, request)


def _function(module: torch.fx.GraphModule, request: GraphRequest) -> GraphFunction:
    forward = module.forward
    if request.frozen:
        frozen = [w.clone() for w in request.weights]  # the live ones may be edited
        return lambda _, inputs: forward(*frozen, *inputs)

    def call(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return forward(*weights, *inputs)

    return call
