"""A ControlNet whose blocks run compiled, over the same engine as the UNet's.

A ControlNet is the UNet's encoder once more, with a 1x1 convolution behind each block, so that
most of its units have graphs that the UNet's have. The host's own forward runs over holders.
What it makes of the control image does not depend on the step, and is kept for a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.cldm.cldm import ControlNet as ControlModel
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import nn

from .optimized import OptimizedModel
from .patches import UNPATCHED
from .progress import CompileProgress
from .residuals import Form, Residuals, forms_of, pack, unpack
from .shadow import Holder
from .unet_block import UNetBlock
from .unit import RunContext

_LISTS = ("input_blocks", "zero_convs")
_SINGLE = ("middle_block", "middle_block_out")
_HINT = ("input_hint_block", "transformer_layes", "spatial_ch_projs", "control_add_embedding")
"""Children that work on the control image and its kind only (the host's spelling)."""

_HOST_FORWARD = ControlModel.forward
_HOST_SEQUENTIAL = TimestepEmbedSequential.forward

_MOST_HINTS = 8
"""Control images whose embeddings are kept in a run: an embedding of SDXL at 1024² is 10 MiB."""


class Hint(NamedTuple):
    """What a ControlNet makes of one control image, (1 or B, C, H, W), and of its kind, (1, E).

    image: the image itself. The host keeps it for a run and changes it for no one.
    """

    image: weakref.ref[torch.Tensor]
    kinds: tuple[int, ...]
    features: torch.Tensor
    kind: torch.Tensor | None


class Call(NamedTuple):
    """One call of a ControlNet: (x, features, timesteps, context, y, kind), and what else counts.

    run: the run that it was prepared in.
    state: number of all that is baked into captures of the model.
    again: prepares the same call in another run.
    """

    net: OptimizedControlNet
    model: Any
    given: tuple[Any, ...]
    others: dict[str, Any]
    run: RunContext
    state: int
    again: Callable[[], Call | None]

    def fresh(self) -> Call | None:
        """This call in the run that is under way: another may have ended the first."""
        return self if self.net.is_in(self.run) else self.again()

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in self.given if t is not None]

    @property
    def signature(self) -> tuple[Any, ...]:
        specs = [None if t is None else (t.shape, t.dtype) for t in self.given]
        return (self.state, *specs, _kinds(self.others))

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Equal for calls that give residuals of the same shapes and dtype."""
        x = self.given[0]
        channels = [convolution[0].out_channels for convolution in self.model.zero_convs]
        return (x.shape, x.dtype, channels)


class OptimizedControlNet(OptimizedModel):
    """The model inside a ControlNet of SD1.5's or SDXL's kind, Union ControlNets too."""

    inside = (*_LISTS, *_SINGLE, *_HINT)
    counters = ("control_runs", "control_replays")

    sampled_with: Callable[[], nn.Module | None] = staticmethod(lambda: None)
    """A reference to the UNet of the last run."""

    _hints: tuple[Hint, ...] = ()

    _written: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
    """While residuals are written to places of their own: the strength, and where, by block."""

    def _hold(self, model: nn.Module) -> dict[str, nn.Module]:
        self.blocks = []
        self._forms: dict[Any, list[Form]] = {}

        # What holds itself waits for Python's collector, and the weights with it.
        this: Any = weakref.proxy(self)

        def hold(name: str, block: nn.Module) -> Holder:
            optimized = UNetBlock(name, ("control", len(self.blocks)), block)
            self.blocks.append(optimized)
            return Holder(partial(OptimizedControlNet._run_block, this, optimized))

        holders: dict[str, nn.Module] = {}
        for name in _LISTS:
            blocks = enumerate(getattr(model, name))
            holders[name] = nn.ModuleList([hold(f"{name}.{i}", block) for i, block in blocks])
        for name in _SINGLE:
            holders[name] = hold(name, getattr(model, name))
        return holders

    def _blocks(self, model: Any) -> list[nn.Module]:
        lists = [block for name in _LISTS for block in getattr(model, name)]
        return [*lists, *(getattr(model, name) for name in _SINGLE)]

    def prepare(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        others: dict[str, Any],
        *,
        progress: CompileProgress,
        freeze: bool,
    ) -> Call | None:
        """Get ready for one call of the host's ControlNet.forward; None if that has to be stock.

        args: (x, hint, timesteps, context, y); x is (B, C, H, W), hint the control image,
        (1 or B, 3, 8H, 8W).
        others: what else it takes, such as the control_type of a Union ControlNet.
        """
        x, hint, timesteps, context, y = args
        with self._lock:
            reason = _foreign_code(model, self._blocks(model)) or _bad_kinds(model, others)
            if reason is not None:
                self.end()
                self._refuse(reason)
                return None
            run = self._ready(model, x, progress, freeze)
            if run is None:
                return None
            seen = self._see(model, hint, others, x.dtype)
            given = (x, seen.features, timesteps, context, y, seen.kind)
            again = partial(self.prepare, model, args, others, progress=progress, freeze=freeze)
            return Call(self, model, given, others, run, self._captures.state, again)

    def is_in(self, run: RunContext) -> bool:
        """Whether `run` is the one under way."""
        return self._run is run

    @property
    def captures(self) -> bool:
        """Whether calls of this run can be captured at all."""
        return self._captures.replayer is not None

    def __call__(self, call: Call) -> Residuals:
        """Run a call that was prepared."""
        with self._lock:
            run = self._run
            assert run is not None
            if not self._captures.usable(call.given[0].device):
                run.pieces = None
                return self._launch(call, call.given)
            packed = self._as_one(call.signature, call.tensors, None, partial(self.packed, call))
            if packed is None:
                return self._launch(call, call.given)
            return unpack(packed, self.forms(call))

    def packed(
        self, call: Call, tensors: Sequence[torch.Tensor], forms: list[Form] | None = None
    ) -> torch.Tensor:
        """Run `call` over other tensors, launch by launch; its residuals as one tensor, laid out
        as others of the same shapes are if their `forms` are given."""
        residuals = self._launch_over(call, tensors)
        self._forms[call.signature] = forms_of(residuals)
        return pack(residuals, forms or self._forms[call.signature])

    def write(
        self,
        call: Call,
        tensors: Sequence[torch.Tensor],
        strength: torch.Tensor,
        packed: torch.Tensor,
        forms: list[Form],
    ) -> None:
        """Run `call` over other tensors, launch by launch, and write each of its residuals, times
        `strength`, to its place in `packed` as soon as it is there."""
        residuals = unpack(packed, forms)
        places = {f"zero_convs.{i}": place for i, place in enumerate(residuals["output"])}
        places["middle_block_out"] = residuals["middle"][0]
        self._written = (strength, places)
        try:
            self._launch_over(call, tensors)
        finally:
            self._written = None

    def forms(self, call: Call) -> list[Form]:
        """What is in the packed residuals of such calls, once there was one."""
        return self._forms[call.signature]

    def _launch_over(self, call: Call, tensors: Sequence[torch.Tensor]) -> Residuals:
        """Launch `call` with other tensors in the place of `call.tensors`."""
        rest = iter(tensors)
        return self._launch(call, [None if t is None else next(rest) for t in call.given])

    def _launch(self, call: Call, given: Sequence[torch.Tensor | None]) -> Residuals:
        """Let the host run the call over the holders, with the image's features for the image."""
        x, features, timesteps, context, y, kind = given
        stand_ins = self._holders | {"input_hint_block": Holder(lambda *_: features)}
        if kind is not None:
            stand_ins["control_add_embedding"] = Holder(lambda *_: kind)
        with _swapped(call.model, stand_ins, {"union_controlnet_merge": lambda *_: features}):
            try:
                residuals: Residuals = call.model(x, features, timesteps, context, y, **call.others)
                return residuals
            finally:
                self._captures.projections.end_call()
                self._progress.finish(self._is_pending())

    def _run_block(
        self,
        block: UNetBlock,
        h: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._run is not None
        result = block(h, emb, context, {}, None, (None, None, None), self._run, UNPATCHED)
        if self._written is None or block.name not in self._written[1]:
            return result
        strength, places = self._written
        return torch.mul(result, strength, out=places[block.name])

    def _see(
        self, model: Any, image: torch.Tensor, others: dict[str, Any], dtype: torch.dtype
    ) -> Hint:
        """What the host's own layers make of the control image, once a run."""
        kinds = _kinds(others)
        self._hints = tuple([hint for hint in self._hints if hint.image() is not None])
        for hint in self._hints:
            if hint.image() is image and hint.kinds == kinds:
                return hint
        kind = None
        if model.control_add_embedding is not None:
            kind = model.control_add_embedding(list(kinds), dtype, image.device)
        if kind is not None and kinds:
            images = image if image.ndim == 5 else image.unsqueeze(0)
            features = model.union_controlnet_merge(images, list(kinds), None, None)
        else:
            features = model.input_hint_block(image, None, None)
        hint = Hint(weakref.ref(image), kinds, features, kind)
        self._hints = (*self._hints[1 - _MOST_HINTS :], hint)
        self._engine.counters.add("hint_embeddings")
        return hint

    def end(self) -> None:
        with self._lock:
            self._hints = ()
            super().end()

    def drop_captures(self) -> None:
        with self._lock:
            self._forms.clear()
            super().drop_captures()


@contextmanager
def _swapped(
    model: nn.Module, children: dict[str, nn.Module], methods: dict[str, Any]
) -> Iterator[None]:
    modules, own = model._modules, vars(model)
    stock = {name: modules[name] for name in children}
    modules.update(children)
    own.update(methods)
    try:
        yield
    finally:
        modules.update(stock)
        for name in methods:
            del own[name]


def _kinds(others: dict[str, Any]) -> tuple[int, ...]:
    return tuple(others.get("control_type", ()))


def _foreign_code(model: nn.Module, blocks: Sequence[nn.Module]) -> str | None:
    """Why a call of this model is not what the host's own code alone would do."""
    own, forward = vars(model), ControlModel.forward
    if type(model) is not ControlModel:
        return f"the ControlNet is a {type(model).__name__}"
    if forward is not _HOST_FORWARD or not forward.__module__.startswith("comfy."):
        return "another node pack replaced ComfyUI's ControlNet.forward"
    if "forward" in own or "union_controlnet_merge" in own:
        return "another node pack replaced the ControlNet's forward"
    if model._forward_hooks or model._forward_pre_hooks:
        return "the ControlNet has hooks"
    # The host calls the blocks as modules here; what is inside of them is looked at by block.py.
    if TimestepEmbedSequential.forward is not _HOST_SEQUENTIAL or any(
        b._forward_hooks or b._forward_pre_hooks or "forward" in vars(b) for b in blocks
    ):
        return "another node pack has hooks on the ControlNet's blocks, or replaced their forward"
    if type(model.input_hint_block) is not TimestepEmbedSequential:
        return "another node pack replaced the ControlNet's hint block"
    return None


def _bad_kinds(model: Any, others: dict[str, Any]) -> str | None:
    """Kinds of image that a Union ControlNet does not know: the host has the words for that."""
    if model.control_add_embedding is None:
        return None
    if all(kind < model.num_control_type for kind in _kinds(others)):
        return None
    return "it does not know this control_type"
