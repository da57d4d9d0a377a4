"""Options, read from the innermost context of the thread."""

import threading
from collections.abc import Callable
from typing import Any

from . import build


class OptPipelines:
    pipelines: dict[str, Callable[[Any], None]] = {}  # noqa: RUF012

    @classmethod
    def register_pipeline(cls, name: str, function: Callable[[Any], None]) -> None:
        cls.pipelines[name] = function


class Config:
    """Takes any attribute; a misspelt one changes nothing."""

    _contexts = threading.local()

    def __init__(self) -> None:
        self._pipeline = "DISC"  # even if it was not built in
        self.freeze_module = True
        for name in build.options:
            setattr(self, name, False)

    @property
    def optimization_pipeline(self) -> str:
        return self._pipeline

    @optimization_pipeline.setter
    def optimization_pipeline(self, name: str) -> None:
        assert name in OptPipelines.pipelines, f"{name} is not registered"
        self._pipeline = name

    @classmethod
    def _stack(cls) -> "list[Config]":
        if not hasattr(cls._contexts, "stack"):
            cls._contexts.stack = []
        stack: list[Config] = cls._contexts.stack
        return stack

    @classmethod
    def get_current_context_or_new(cls) -> "Config":
        return cls._stack()[-1] if cls._stack() else cls()

    def __enter__(self) -> "Config":
        self._stack().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack().pop()
