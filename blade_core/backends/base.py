"""What every compiler has to offer. The contract test runs over each of them."""

from __future__ import annotations

from typing import Protocol

import torch

from ..graph import Compiled, GraphFunction, GraphRequest


class Backend(Protocol):
    """One compiler."""

    name: str
    channels_last: bool
    """Whether its graphs are best given 4-D tensors in channels-last strides."""
    capturable: bool
    """Whether a call of its graphs only launches kernels, so that a CUDA graph can hold them."""

    def available(self, device: torch.device) -> str | None:
        """Return None if the compiler can run for `device`, else the exact reason."""
        ...

    def preload(self) -> None:
        """Import what compiling and loading need, as far as that touches no GPU."""
        ...

    def joins(self, device: torch.device) -> bool:
        """Whether its graphs compute linear layers over the same tokens as one product where
        their weights lie one behind the other."""
        ...

    def fingerprint(self) -> str:
        """Name, version and options: everything of the compiler that a key must count."""
        ...

    def compile(self, request: GraphRequest) -> Compiled:
        """Build the graph, or raise.

        Unless `request.frozen`, the weights passed in each call are those that are used.
        """
        ...

    def job(self, request: GraphRequest) -> bytes | None:
        """Return the request as work for another process, or None where only this one can
        compile it."""
        ...

    def compile_job(self, job: bytes) -> bytes:
        """In that process: return the artifact, or raise."""
        ...

    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        """Return the graph stored in `artifact`, which `compile` made for an equal request."""
        ...
