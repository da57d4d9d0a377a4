"""A compiler that does what a test says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from blade.blade_core.graph import Compiled, GraphFunction, GraphRequest

PATIENCE = 20.0
Spoil = Callable[[torch.Tensor], torch.Tensor]


class Fake:
    """A backend that runs the module eager and then spoils the result, or raises."""

    channels_last = True
    capturable = True

    def __init__(
        self,
        name: str = "fake",
        *,
        reason: str | None = None,
        error: BaseException | None = None,
        spoil: Spoil = lambda result: result,
    ) -> None:
        self.name = name
        self.reason = reason
        self.error = error
        self.spoil = spoil
        self.compiles = 0

    def available(self, device: torch.device) -> str | None:
        return self.reason

    def preload(self) -> None:
        pass

    def joins(self, device: torch.device) -> bool:
        return False

    def fingerprint(self) -> str:
        return self.name

    def compile(self, request: GraphRequest) -> Compiled:
        self.compiles += 1
        if self.error is not None:
            raise self.error
        return Compiled(lambda w, x: self.spoil(request.eager(w, x)), None, 7)

    def job(self, request: GraphRequest) -> bytes | None:
        return None

    def compile_job(self, job: bytes) -> bytes:
        raise NotImplementedError

    def load(self, artifact: bytes, request: GraphRequest) -> GraphFunction:
        raise NotImplementedError
