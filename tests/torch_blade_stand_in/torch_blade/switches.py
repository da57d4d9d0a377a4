"""What a test can provoke. With the defaults everything works."""

from collections.abc import Callable
from typing import Any

import torch

trace_error: Exception | None = None
"""Raised instead of tracing."""

compile_error: Exception | None = None
"""Raised by the compiler of a cluster."""

skip_freezing = False
"""Freezing does nothing, as it does for a module in training mode."""

rename = False
"""The result has other parameter names than the module."""

during_optimize: Callable[[], None] | None = None
"""Called in each `optimize`, at the point where no second one may run."""

during_run: Callable[[torch.Tensor], torch.Tensor] | None = None
"""What an engine makes of the graph's first input, in each call, before any operation."""

optimized_with: list[dict[str, Any]] = []
"""What each `optimize` was given, and the options that were in force."""
