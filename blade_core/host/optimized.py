"""A model of blocks that runs compiled: what its runs begin and end with.

The UNet (unet.py), the ControlNet (control.py) and the VAE (vae.py) say which of their modules
are blocks and how the host calls them; all else is the same for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import comfy.model_management
import torch
from torch import nn

from ..backends import Backend
from ..capture import CaptureBudget, Work
from ..config import OptimizeConfig
from ..engine import Engine
from ..errors import BackendUnavailable, UnknownStructure, WeightsFrozen
from ..key import GraphKey, environment
from ..log import logger, warn_once
from ..structure import describe_classes
from .attention import attention_names
from .block import OptimizedBlock
from .captures import ModelCaptures
from .joined import join_weights
from .progress import CompileProgress
from .step import describe_outer, outer_modules, replaced_by_others
from .unit import RunContext
from .weights import ChannelsLast, Watch, parameter_slots

_REBUILD = (
    "freeze_weights is on and the weights changed (LoRA, checkpoint or strength): Blade compiles "
    "again. Turn freeze_weights off to switch without compiling."
)


class OptimizedModel:
    """What Blade knows of one model under one configuration. Holds no reference to the model."""

    inside: ClassVar[tuple[str, ...]]
    """Children of the model that hold the blocks, or that are never part of a capture."""
    counters: ClassVar[tuple[str, str]]
    """Names of the counters of its runs and of its replays."""
    rearranges: ClassVar[bool] = True
    """Whether convolution weights are channels-last for a run; else graphs rearrange them."""
    one_call: ClassVar[bool] = False
    """Whether a run is a call or few, so that what they tell of captures is kept over runs."""

    def __init__(
        self, model: nn.Module, engine: Engine, budget: CaptureBudget, config: OptimizeConfig
    ) -> None:
        self.name = type(model).__name__
        self.config = config
        self.blocks: list[OptimizedBlock] = []
        self.why_not: str | None = None
        self.compilers: tuple[str, ...] = ()
        self._engine = engine
        self._lock = threading.RLock()
        self._layout = ChannelsLast()
        self._run: RunContext | None = None
        self._watch = Watch()
        self._captures = ModelCaptures(budget, strict=config.strict, over_runs=self.one_call)
        self._held = 0
        self._bound = 0
        self._rebuilds = False
        self._told = False
        self._code: tuple[Any, ...] = ()
        self._progress = CompileProgress(None)
        self._holders = self._hold(model)

    def _hold(self, model: nn.Module) -> dict[str, nn.Module]:
        """Set `blocks`, and return what stands in the place of the children that hold them."""
        raise NotImplementedError

    def _blocks(self, model: Any) -> list[nn.Module]:
        """The blocks of `model` in the order of `blocks`."""
        raise NotImplementedError

    def _as_one(
        self,
        signature: Hashable,
        tensors: Sequence[torch.Tensor],
        reason: str | None,
        work: Callable[[Sequence[torch.Tensor]], torch.Tensor],
        within: Sequence[OptimizedModel] = (),
    ) -> torch.Tensor | None:
        """Replay a call as one capture, or record it; None if that cannot be: it has to be
        launched then, and its blocks may be captured one by one.

        reason: why it cannot be, if that is known.
        work: runs the call over such tensors, launch by launch.
        within: other models that `work` runs, whose runs are under way.
        """
        replayer, models = self._captures.replayer, (self, *within)
        runs = [model._run for model in models if model._run is not None]
        assert replayer is not None and len(runs) == len(models)
        reasons = [model._captures.why_not for model in models]
        reason = reason or next((found for found in reasons if found is not None), None)
        if reason is not None or replayer.never(signature):
            runs[0].pieces = replayer
            if reason is not None:
                replayer.reasons.add(reason)
            return None
        for run in runs:
            run.begin_call()
        runs[0].checkpoint()  # a replay passes none of the places where the host looks for one
        result = replayer.replay(signature, tensors)
        if result is not None:
            for model in models:
                model._captures.replays += 1
            return result
        captured = Work(
            work,
            lambda: next((run.cut for run in runs if run.cut is not None), self._pays_not()),
            lambda: [model._graphs_in_use() for model in models],
            lambda: any(run.pending for run in runs) or self._tells_nothing(),
        )
        result = replayer(signature, captured, tensors)
        for model in within:
            model._captures.held_by(self._captures, signature)
        return result

    def _pays_not(self) -> str | None:
        """Asked after a call that was launched: why recording such calls would gain nothing."""
        return None

    def _tells_nothing(self) -> bool:
        """Asked then, too: whether that call was not like those to come."""
        return False

    def end(self) -> None:
        """End of a run: give the weights back as they were, let go of everything per run."""
        with self._lock:
            run, self._run = self._run, None
            self._told = False
            self._layout.restore()
            self._watch.stop()
            if run is None:
                return
            if run.pending:
                run.engine.counters.add("runs_pending")
            if replays := self._captures.replays:
                run.engine.counters.add(self.counters[1], replays)
                for block in self.blocks:  # each replay ran them all
                    block.compiled_calls += replays
            for block in self.blocks:
                block.end(run.engine.counters)

    def drop_captures(self) -> None:
        """The host takes the model off the GPU: its captures go too."""
        with self._lock:
            self._captures.drop()

    def _ready(
        self, model: nn.Module, x: torch.Tensor, progress: CompileProgress, freeze: bool
    ) -> RunContext | None:
        """Begin a run if none is under way; None if this model has to run as stock."""
        if self._run is None or self._moved(x):
            self._begin(model, x, progress, freeze)
        if self._run is not None:
            self._run.begin_call()
        return self._run

    def _begin(
        self, model: nn.Module, x: torch.Tensor, progress: CompileProgress, freeze: bool
    ) -> None:
        told = self._told  # in this run, each call of which tries again
        self.end()
        self.why_not = None
        try:
            backends = self._engine.backends(self.config, x.device)
        except BackendUnavailable as error:
            if self.config.strict:
                raise
            self._refuse(str(error))
            if not told:
                progress.stock(str(error))
            self._told = True
            return
        replaced = replaced_by_others()
        if replaced is not None:
            self._refuse(replaced)
            return
        if torch.is_grad_enabled():
            self._refuse("gradients are enabled")
            return
        if torch.is_autocast_enabled(x.device.type):  # which no key counts, and no replay sees
            self._refuse("autocast is enabled")
            return
        if [block.block for block in self.blocks] != self._blocks(model):  # a block was replaced
            self._holders = self._hold(model)
            self._held += 1
        self._bound = 0
        self._rebuilds = False
        self._progress = progress
        self.compilers = tuple(backend.name for backend in backends)
        memory_format = _memory_format(x, backends[0])
        run = RunContext(
            engine=self._engine,
            config=self.config,
            backends=backends,
            environment=environment(x.device, (*attention_names(), str(memory_format))),
            memory_format=memory_format,
            weight_format=memory_format if self.rearranges else torch.contiguous_format,
            freeze=freeze,
            checkpoint=comfy.model_management.throw_exception_if_processing_interrupted,
            announce=self._announce,
            beside=lambda: self._progress.beside(),
            bound=self._count_bound,
            weights_changed=self._weights_changed,
            projections=self._captures.projections,
            parallel=self._parallel(x.device),
        )
        code = (attention_names(), describe_classes(model))
        for block in self.blocks:
            if code != self._code:
                block.forget()
            block.read()
        self._code = code
        if backends[0].joins(x.device):
            join_weights([a for block in self.blocks for a in block.attentions], x.device)
        slots = [slot for block in self.blocks for slot in block.slots()]
        if run.weight_format == torch.channels_last:  # the GPU works on it while Python goes on
            self._layout.apply((tensors[key] for tensors, key in slots), x.device)
        for block in self.blocks:
            block.begin(x.device, x.dtype, run)
        outer = outer_modules(model, self.inside)
        parts = [part for block in self.blocks for part in block.containers()]
        self._watch.start(slots + parameter_slots(outer), parts)
        captures = self._captures
        captures.projections.begin([p for block in self.blocks for p in block.projections()])
        captures.begin(
            x.device,
            outer,
            wanted=self.config.capture,
            forgotten=self._engine.cache.forgotten,
        )
        if not captures.still_fit(x.device, self._baked(model, run), self._watch.first):
            self.drop_captures()
        self._run = run
        self._engine.counters.add(self.counters[0])

    def _is_pending(self) -> bool:
        return self._run is not None and self._run.pending

    def _parallel(self, device: torch.device) -> bool:
        """Whether other processes are to compile."""
        jobs = self._engine.jobs
        return jobs.usable(device) if self.config.compile == "background" else jobs.pays(device)

    def _baked(self, model: nn.Module, run: RunContext) -> tuple[Any, ...]:
        """All that captures of this model hold for good, besides its graphs."""
        try:
            outer = describe_outer(model, self.inside)
        except UnknownStructure as error:
            outer = None
            self._captures.why_not = f"outside the blocks, {error}"
        return (
            run.environment,
            _at_launch(),
            outer,
            self._held,
            [unit.frozen for block in self.blocks for unit in block.units],
            [(block.why_not, block.changes) for block in self.blocks],
            self._watch.addresses,
            self._layout.addresses,
        )

    def _moved(self, x: torch.Tensor) -> bool:
        """Whether the run has to begin anew: weights moved, or the call came from elsewhere."""
        return self._captures.moved(x.device) or self._watch.moved()

    def _graphs_in_use(self) -> Any:
        graphs = [unit.graphs.copy() for block in self.blocks for unit in block.units]
        return graphs, self._captures.projections.in_use()

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        warn_once(f"This model runs as stock: {reason}")

    def _announce(self, key: GraphKey) -> None:
        total = sum(len(block.units) for block in self.blocks)
        self._progress.compiling(key, self._bound, total)

    def _weights_changed(self) -> None:
        if self.config.frozen_change == "refuse":
            raise WeightsFrozen(
                "freeze_weights is on and the weights changed (LoRA, checkpoint or strength); "
                "frozen_change is refuse, so that nothing is compiled again. Take the change back, "
                "set frozen_change to rebuild, or turn freeze_weights off."
            )
        if not self._rebuilds:  # once a run, however many graphs it concerns
            logger.warning(_REBUILD)
        self._rebuilds = True

    def _count_bound(self) -> None:
        self._bound += 1

    def report(self) -> dict[str, Any]:
        """What the last run did, block by block."""
        return {
            "model": self.name,
            "backend": self.config.backend,
            "compilers": list(self.compilers),
            "freeze_weights": self.config.freeze_weights,
            "on_failure": self.config.on_failure,
            "runs_as_stock": self.why_not,
            **self._captures.report(),
            "blocks": [block.report() for block in self.blocks],
        }


def _memory_format(x: torch.Tensor, backend: Backend) -> torch.memory_format:
    """Channels last is what tensor cores and CPU kernels want; fp32 on a GPU gains nothing."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if backend.channels_last and (x.device.type == "cpu" or (x.device.type == "cuda" and half)):
        return torch.channels_last
    return torch.contiguous_format


def _at_launch() -> tuple[bool, ...]:
    """What cuDNN and cuBLAS are told at each launch, which a replay is none of."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    return cudnn.enabled, cudnn.deterministic, cudnn.benchmark, bool(reduced)
