"""The compiler got ready before ComfyUI loads a prompt's models."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ..blade_core.config import OptimizeConfig
from ..blade_core.errors import BladeError
from ..blade_core.host.model import expect


class GetsReady:
    """A node that compiles: it hears of a prompt before the first node of that runs."""

    @classmethod
    def IS_CHANGED(
        cls, backend: str = "auto", compile: str = "first", enabled: bool = True, **_: Any
    ) -> str:
        """Asked of every node of a prompt, with what does not come from other nodes, before any
        runs. Its inputs say all that the result depends on, so the answer is always the same."""
        if enabled:
            with suppress(BladeError):  # the node itself will say so
                expect(OptimizeConfig(backend=backend, compile=compile))
        return ""
