"""Residuals that are computed late: by the UNet's capture, beside its encoder, where that can be.

The host asks ControlNets for their residuals before it calls the UNet, which needs them only
after its encoder. So what it gets is a mapping that is computed when somebody looks into it.
If the first to see it is Blade's UNet, the ControlNets become part of the UNet's one capture, on
a second stream; for everybody else it is as if it had been there all the time.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.controlnet import ControlNet

from ..recorder import Aside
from .control import Call, OptimizedControlNet
from .residuals import Residuals, unpack


class Late(UserDict[str, list[Any]]):
    """A mapping that is computed when somebody looks into it."""

    _computed: Residuals | None = None

    def __init__(self) -> None:
        """Nothing is there yet: UserDict's own would put an empty dict into `data`."""

    @property
    def data(self) -> Residuals:  # type: ignore[override]
        if self._computed is None:
            self._computed = self.compute()
        return self._computed

    def copy(self) -> Residuals:  # type: ignore[override]
        return dict(self.data)

    def __copy__(self) -> Residuals:  # type: ignore[override]
        return dict(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Residuals:
        return copy.deepcopy(dict(self.data), memo)

    def __or__(self, other: Any) -> Any:
        return dict(self.data) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self.data)

    @property
    def untouched(self) -> bool:
        """Whether nobody has looked into it."""
        return self._computed is None

    @abstractmethod
    def compute(self) -> Residuals: ...


class LateResiduals(Late):
    """What one call of a ControlNet gives."""

    def __init__(self, call: Call, stock: Callable[[], Residuals]) -> None:
        self.call, self._stock = call, stock

    def compute(self) -> Residuals:
        call = self.call.fresh()
        return self._stock() if call is None else call.net(call)


class LateControl(Late):
    """The sum of the residuals of a chain of ControlNets, each times its strength.

    links: for each its control object, its residuals, and its strength as a tensor of one
    element, so that another strength is another value and no other capture.
    """

    def __init__(self, links: Sequence[tuple[ControlNet, LateResiduals, torch.Tensor]]) -> None:
        self.links = tuple(links)

    def compute(self) -> Residuals:
        total = None
        for control, residuals, _ in self.links:
            total = ControlNet.control_merge(control, residuals, total, None)
        assert total is not None
        result: Residuals = total
        return result

    def consume(self) -> None:
        """Leave what the host's UNet leaves of residuals that it has added: empty lists."""
        self._computed = {"input": [], "middle": [], "output": []}

    def calls(self) -> Calls | None:
        """The calls in the runs that are under way; None if one of them has to be stock."""
        calls = [residuals.call.fresh() for _, residuals, _ in self.links]
        if any(call is None for call in calls):
            return None
        strengths = [strength for *_, strength in self.links]
        return Calls([(c, s) for c, s in zip(calls, strengths, strict=True) if c is not None])


class Calls:
    """Calls of a chain of ControlNets that are ready to be launched, with their strengths."""

    def __init__(self, links: list[tuple[Call, torch.Tensor]]) -> None:
        self._links = links

    @property
    def models(self) -> list[OptimizedControlNet]:
        return list(dict.fromkeys(call.net for call, _ in self._links))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for call, strength in self._links for t in (*call.tensors, strength)]

    @property
    def signature(self) -> tuple[Any, ...]:
        return tuple([call.signature for call, _ in self._links])

    def launch(self, tensors: Sequence[torch.Tensor]) -> tuple[Residuals, Callable[[], None]]:
        """Compute it over such tensors, launch by launch; in a recording each model on a
        stream of its own, beside what comes after.

        The residuals may be read once the function that comes with them was called.
        """
        parts = self._parts(tensors)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            total, forms = None, None
            for call, given, strength in parts:
                one = call.net.packed(call, given, forms).mul_(strength)
                total = one if total is None else total.add_(one)  # as the host does
                forms = forms or call.net.forms(call)
            assert total is not None and forms is not None
            return unpack(total, forms), _nothing
        forms = parts[0][0].net.forms(parts[0][0])
        size = sum(form.shape.numel() for form in forms)
        # From this stream, where they will be read and freed.
        total, *others = (tensors[0].new_empty(size) for _ in parts)
        # A model that comes twice is one stream: what it keeps between its kernels is there once.
        aside = {call.net: Aside(total.device) for call, *_ in parts}

        def join() -> None:
            while aside:
                aside.popitem()[1].join()
            while others:
                total.add_(others.pop(0))

        try:
            for (call, given, strength), one in zip(parts, (total, *others), strict=True):
                with aside[call.net]:
                    call.net.write(call, given, strength, one, forms)
        except BaseException:
            join()  # a recording must not end with streams of its own
            raise
        return unpack(total, forms), join

    def _parts(
        self, tensors: Sequence[torch.Tensor]
    ) -> list[tuple[Call, Sequence[torch.Tensor], torch.Tensor]]:
        parts, start = [], 0
        for call, _ in self._links:
            stop = start + len(call.tensors)
            parts.append((call, tensors[start:stop], tensors[stop]))
            start = stop + 1
        return parts


def _nothing() -> None:
    """There is no second stream to wait for."""
