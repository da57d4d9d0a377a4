"""What blocks compute from the timestep embedding or the prompt alone, before they see an image.

Keys and values of every cross-attention depend on the prompt only, so that they stay the same
over a run; the embedding's projections of all ResBlocks have one input. Taken out of the
blocks, each group is one kernel where that can run, and the host's own layers elsewhere.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn

from ..errors import first_line, is_cancel, is_out_of_memory
from ..kernels.grouped_linear import GroupedLinear, usable
from ..log import warn_once

_MOST_GROUPS = 16
"""How many shapes of inputs are kept: of SDXL at batch 1, one holds 50 MiB."""


class Projection:
    """Linear layers of one block over one of its inputs, as the host holds them.

    source: "emb" or "context", the name of that input.
    """

    def __init__(
        self, source: str, layers: Sequence[nn.Linear], activation: nn.Module | None = None
    ) -> None:
        self.source = source
        self.layers = tuple(layers)
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., N) of one layer, (2B, ..., N) of two, by the host's own code."""
        if self.activation is not None:
            x = self.activation(x)
        results = [layer(x) for layer in self.layers]
        return results[0] if len(results) == 1 else torch.cat(results)


class Projections:
    """All projections of a UNet, computed together at the first use in each call."""

    def __init__(self) -> None:
        self._all: dict[str, list[Projection]] = {"emb": [], "context": []}
        self._groups: dict[tuple[Any, ...], _Group | None] = {}
        self._now: dict[str, tuple[torch.Tensor, _Group | None]] = {}
        self._last: list[_Group | None] = []
        # Captures keep groups that are not kept here any more.
        self._kernels: weakref.WeakSet[GroupedLinear] = weakref.WeakSet()

    def begin(self, projections: Sequence[Projection]) -> None:
        """A run begins: weights may have other values, and still be where they were."""
        for source, members in self._all.items():
            members[:] = [p for p in projections if p.source == source]
        self.forget()

    def forget(self) -> None:
        """Keep no result: the weights may have changed in place."""
        for kernel in list(self._kernels):
            kernel.forget()

    def clear(self) -> None:
        """The weights are elsewhere, or no longer on the device: nothing here holds any more."""
        self._groups.clear()
        self._now.clear()
        self._last = []

    def end_call(self) -> None:
        self._last = [group for _, group in self._now.values()]
        self._now.clear()

    def in_use(self) -> Any:
        """What the last call used, and a capture of it needs to stay where it is."""
        return self._last

    def __call__(self, projection: Projection, x: torch.Tensor) -> torch.Tensor:
        seen, group = self._now.get(projection.source, (None, None))
        if seen is not x:
            group = self._group(projection.source, x)
            if group is not None:
                _launch(group.kernel, x)
            self._now[projection.source] = (x, group)
        return projection(x) if group is None else group.results[projection]

    def _group(self, source: str, x: torch.Tensor) -> _Group | None:
        key = (source, x.shape, x.dtype, x.device)
        if key not in self._groups:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # its table cannot be made within a recording
            if len(self._groups) >= _MOST_GROUPS:
                del self._groups[next(iter(self._groups))]
            group = self._groups[key] = _group(self._all[source], x)
            if group is not None:
                self._kernels.add(group.kernel)
        return self._groups[key]


class _Group:
    def __init__(self, kernel: GroupedLinear, results: dict[Projection, torch.Tensor]) -> None:
        self.kernel = kernel
        self.results = results


def _group(projections: Sequence[Projection], x: torch.Tensor) -> _Group | None:
    """The projections as one kernel, or None where that cannot give what the layers give."""
    layers = [layer for p in projections for layer in p.layers]
    if not layers or not all(_plain(layer) for layer in layers):
        return None
    tensors = [(layer.weight, layer.bias) for layer in layers]
    if not usable(x, tensors):
        return None
    prompt = projections[0].source == "context"
    try:
        kernel = GroupedLinear(x, tensors, silu=not prompt, skip_unchanged=prompt)
        _launch(kernel, x)
    except Exception as error:  # whatever Triton raises where it cannot compile
        if is_cancel(error) or is_out_of_memory(error):
            raise
        warn_once(f"Blade's own kernel cannot run here: {first_line(error)}")
        return None
    outputs = iter(kernel.outputs)
    results = {}
    for projection in projections:
        parts = [next(outputs) for _ in projection.layers]
        # Keys and values lie one behind the other: a view, where torch.cat copies.
        first, count = parts[0], len(parts)
        results[projection] = first if count == 1 else kernel.adjacent(first, count)
    return _Group(kernel, results)


def _launch(kernel: GroupedLinear, x: torch.Tensor) -> None:
    try:
        kernel(x.contiguous())  # it reads memory as it lies
    except BaseException:
        kernel.forget()  # or a half-done call would be taken for a done one
        raise


def _plain(layer: nn.Linear) -> bool:
    """Whether the host would do no more than multiply: no cast, no patch, no hook."""
    return (
        not getattr(layer, "comfy_cast_weights", False)
        and not getattr(layer, "weight_function", None)
        and not getattr(layer, "bias_function", None)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in vars(layer)
    )


class Part(nn.Module):
    """Takes one layer's result out of a projection of two."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return both.chunk(2)[self.index]


def without_embedding(block: ResBlock) -> tuple[nn.Module, Projection] | None:
    """`block` as a module that takes its projected embedding, and the projection."""
    layers = getattr(block, "emb_layers", None)
    if not isinstance(layers, nn.Sequential) or len(layers) != 2:
        return None
    activation, linear = layers
    if type(activation) is not nn.SiLU or not isinstance(linear, nn.Linear):
        return None
    if layers._forward_hooks or layers._forward_pre_hooks:
        return None
    twin = replaced(block, {"emb_layers": nn.Identity()})
    return twin, Projection("emb", [linear], activation)


def without_context(block: Any) -> tuple[dict[str, nn.Module], Projection] | None:
    """What to replace in a BasicTransformerBlock so that it takes (2B, L, C) keys and values in
    place of the prompt, and their projection."""
    if (
        type(block) is not BasicTransformerBlock
        or type(block.attn2) is not CrossAttention
        or block.disable_self_attn
        or block.switch_temporal_ca_to_sa
    ):
        return None
    keys, values = block.attn2.to_k, block.attn2.to_v
    if not isinstance(keys, nn.Linear) or not isinstance(values, nn.Linear):
        return None
    if keys.out_features != values.out_features:
        return None
    parts = {"attn2.to_k": Part(0), "attn2.to_v": Part(1)}
    return dict(parts), Projection("context", [keys, values])


def replaced(module: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module`, over the same weights, with other modules in some places."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for path, new in replacements.items():
        head, _, rest = path.partition(".")
        child = twin._modules[head]
        assert child is not None
        twin._modules[head] = replaced(child, {rest: new}) if rest else new
    return twin
