"""Which compilers are used: those that the user allows and that can run here."""

from __future__ import annotations

from dataclasses import replace

import torch

from .backends import BACKENDS, Backend
from .backends.inductor import InductorBackend
from .config import OptimizeConfig
from .errors import BackendUnavailable, first_line
from .log import warn_once

_ORDER = ("torch_blade", "inductor")
"""Which is asked first, by `auto` and after a chosen one that cannot run."""


def usable_backends(config: OptimizeConfig, device: torch.device) -> tuple[Backend, ...]:
    """Return the backends that `config` allows on `device`, the one to try first in front.

    Under `fallback` a chosen backend that cannot run is replaced by the next that can,
    with one warning, and what it cannot compile is tried with the next.

    Raises:
        BackendUnavailable: none can run, or the chosen one cannot and `on_failure` is
            `error`. The message holds each one's reason.
    """
    names: tuple[str, ...] = (config.backend,)
    if config.backend == "auto":
        names = _ORDER
    elif config.backend in _ORDER and not config.strict:
        names = _ORDER[_ORDER.index(config.backend) :]
    reasons = {name: _why_not(BACKENDS[name], device) for name in names}
    usable = tuple(_chosen(name, config) for name in names if reasons[name] is None)
    why_not = {name: reason for name, reason in reasons.items() if reason is not None}
    if not usable:
        raise BackendUnavailable(_cannot(config.backend, why_not))
    if config.backend in why_not:
        warn_once(f"{_cannot(config.backend, why_not)} Blade uses {usable[0].name} instead.")
    return usable[:1] if config.strict else usable


def _why_not(backend: Backend, device: torch.device) -> str | None:
    """Why `backend` cannot run for `device`, also where its packages are broken."""
    try:
        return backend.available(device)
    except Exception as error:  # whatever half-imported packages raise
        return f"it cannot be asked ({first_line(error)})"


def _chosen(name: str, config: OptimizeConfig) -> Backend:
    backend = BACKENDS[name]
    if isinstance(backend, InductorBackend):
        return replace(backend, kernels=config.kernels)
    return backend


def _cannot(chosen: str, reasons: dict[str, str]) -> str:
    each = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f'Blade cannot use backend "{chosen}" here. {each}.'
