"""BladeOptimizeModel's work: put Blade onto a clone of a MODEL."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_management import get_torch_device
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from ..capture import CaptureBudget
from ..config import OptimizeConfig, capture_bytes, lora_cache_bytes, store_bytes, store_folder
from ..engine import Engine
from ..log import logger
from ..recorder import CudaRecorder
from .conds import to_device
from .control import OptimizedControlNet
from .dynamic import non_dynamic_clone
from .lora_library import LoraLibrary
from .optimized import OptimizedModel
from .patcher import FUSED, as_stock, switch_in_place
from .progress import CompileProgress, say
from .unet import OptimizedUNet
from .vae import OptimizedVAE

_KEY = "blade"

_State = TypeVar("_State", bound=OptimizedModel)
_States: TypeAlias = "weakref.WeakKeyDictionary[nn.Module, dict[OptimizeConfig, _State]]"


class Session:
    """All of Blade's state in a process: the engine, and what it knows of each model alive."""

    def __init__(self) -> None:
        self.engine = Engine(store=_store())
        self.captures = CaptureBudget(self.engine.counters, CudaRecorder, capture_bytes())
        self.loras = LoraLibrary(lora_cache_bytes())
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._unets: _States[OptimizedUNet] = weakref.WeakKeyDictionary()
        self._controlnets: _States[OptimizedControlNet] = weakref.WeakKeyDictionary()
        self._vaes: _States[OptimizedVAE] = weakref.WeakKeyDictionary()

    def prepare(self, unet: nn.Module) -> None:
        """Once: the first LoRA must find weights as the graphs saw them (hosts before 0.30)."""
        if unet not in self._prepared:
            self._prepared.add(unet)
            unet.requires_grad_(False)

    def states(self, unet: nn.Module) -> list[OptimizedUNet]:
        """What is known of `unet`, under every configuration that it ran with."""
        return list(self._unets.get(unet, {}).values())

    def unet(self, unet: nn.Module, config: OptimizeConfig) -> OptimizedUNet:
        """Return the state of `unet` under `config`; clones and node graphs share it."""
        by_config = self._unets.setdefault(unet, {})
        if config not in by_config:
            by_config[config] = OptimizedUNet(unet, self.engine, self.captures, config)
        return by_config[config]

    def controlnet(self, model: nn.Module, config: OptimizeConfig) -> OptimizedControlNet:
        """Return the state of a ControlNet's `model` under `config`; all its copies share it."""
        by_config = self._controlnets.setdefault(model, {})
        if config not in by_config:
            by_config[config] = OptimizedControlNet(model, self.engine, self.captures, config)
        return by_config[config]

    def clear(self, *, disk: bool, memory: bool) -> list[str]:
        """Delete compiled graphs; return a line on each place that had some to delete."""
        engine, lines = self.engine, []
        if memory:
            lines.append(f"{len(engine.cache) + len(engine.early)} graphs deleted from memory.")
            for model in (*_all(self._unets), *_all(self._controlnets), *_all(self._vaes)):
                model.drop_captures()
            engine.cache.clear()
        if disk or memory:  # from there, and here
            engine.early.clear()
            engine.jobs.clear()
        if disk and engine.store is None:
            lines.append("Graphs on disk are turned off (BLADE_DISK_CACHE_MIB is 0).")
        elif disk and engine.store is not None:
            lines.append(f"{engine.store.clear()} deleted from {engine.store.folder}.")
        return lines

    def vae(self, coder: nn.Module, config: OptimizeConfig) -> OptimizedVAE:
        """Return the state of a VAE's encoder or decoder under `config`; all copies share it."""
        by_config = self._vaes.setdefault(coder, {})
        if config not in by_config:
            by_config[config] = OptimizedVAE(coder, self.engine, self.captures, config)
        return by_config[config]

    def stats(
        self, unet: nn.Module | None = None, config: OptimizeConfig | None = None
    ) -> dict[str, Any]:
        """Counters, cache and models as plain data.

        unet: only this one, under `config` if it has any, and the ControlNets that it was
        sampled with last. VAEs are always all.
        """
        cache, store = self.engine.cache, self.engine.store
        if unet is None:
            states, controlnets = _all(self._unets), _all(self._controlnets)
        else:
            states = [] if config is None else [self.unet(unet, config)]
            controlnets = [c for c in _all(self._controlnets) if c.sampled_with() is unet]
        return {
            "counters": self.engine.counters.snapshot(),
            "cache": {
                "graphs": len(cache),
                "bytes": cache.nbytes,
                "budget_bytes": cache.budget,
                "keys": [str(key) for key in cache.all_keys()],
            },
            "disk": None if store is None else store.report(),
            "lora_files": {
                "reads": self.loras.reads,
                "bytes": self.loras.nbytes,
                "budget_bytes": self.loras.budget,
            },
            "models": [state.report() for state in states],
            "controlnets": [controlnet.report() for controlnet in controlnets],
            "vaes": [vae.report() for vae in _all(self._vaes)],
        }


def _store() -> tuple[Path, int] | None:
    budget = store_bytes()
    try:
        return (store_folder(), budget) if budget else None
    except RuntimeError as error:  # a user without a name has no home
        logger.warning("Blade keeps no graphs on disk: %s Set BLADE_CACHE_DIR.", error)
        return None


def _all(states: _States[_State]) -> list[_State]:
    # Copied in one step: the report is asked for in another thread than that which adds to them.
    by_model = states.data.copy().values()  # type: ignore[attr-defined]
    return [state for by_config in by_model for state in by_config.copy().values()]


@functools.cache
def session() -> Session:
    """The process's one session, made when it is first asked for."""
    return Session()


def started() -> None:
    """The host's server starts: with nothing got ready rather than not at all."""
    try:
        session().engine.started(get_torch_device())
    except Exception:
        logger.debug("nothing could be got ready at the start", exc_info=True)


def expect(config: OptimizeConfig) -> None:
    """A prompt with one of Blade's nodes begins; its models will run on the host's device.

    Raises:
        InvalidChoice: a variable of the environment holds what it may not.
    """
    session().engine.expect(config, get_torch_device())


class Attachment:
    """What the node leaves on a model clone: a wrapper and the two ends of a sampling run."""

    def __init__(self, config: OptimizeConfig, node_id: str | None) -> None:
        self.config = config
        self.node_id = node_id
        self._running: set[OptimizedUNet] = set()
        self._hooked: list[bool] = []
        """Of each run under way, whether LoRA hooks change its weights. Some samplers sample."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self  # hosts before 0.14 deep-copy what hangs on a model's options

    def pre_run(self, patcher: ModelPatcher) -> None:
        self._hooked.append(bool(patcher.hook_patches))

    def cleanup(self, patcher: ModelPatcher | None) -> None:
        del self._hooked[-1:]
        for state in self._running:
            state.end()
        self._running.clear()

    def detach(self, patcher: ModelPatcher, unpatch_all: bool) -> None:
        """The host takes the model off the GPU (if `unpatch_all`) to have the memory back."""
        if unpatch_all:
            for state in session().states(patcher.model.diffusion_model):
                state.drop_captures()

    def sample(
        self, executor: Callable[..., torch.Tensor], guider: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The SAMPLER_SAMPLE wrapper: a run begins, and its prompts are what they will be."""
        conds = getattr(guider, "conds", None)
        if isinstance(conds, dict):
            to_device(conds, guider.model_patcher.load_device)
        return executor(guider, *args, **kwargs)

    def wrap(
        self, executor: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The DIFFUSION_MODEL wrapper. `executor.class_obj` tells which UNet is called: hooks
        and several GPUs bring others than the one that the node saw."""
        unet = executor.class_obj  # type: ignore[attr-defined]
        if not isinstance(unet, UNetModel) or len(args) < 6:
            return executor(*args, **kwargs)  # nothing that the host itself ever calls so
        state = session().unet(unet, self.config)
        self._running.add(state)
        hooked = self._hooked[-1:] == [True]
        try:
            return state.call(
                executor,
                unet,
                args,
                kwargs,
                progress=CompileProgress(self.node_id),
                freeze=self.config.freeze_weights and not hooked,
                hooked=hooked,
            )
        finally:
            if not self._hooked:  # called outside of a sampler: each call is a run
                self.cleanup(None)


def optimize_model(
    model: ModelPatcher, config: OptimizeConfig, *, node_id: str | None = None
) -> ModelPatcher:
    """Return a clone of `model` whose UNet blocks run compiled; `model` stays as it is.

    A model that is no SD1.5 / SDXL kind of UNet comes back unchanged, with a message. An
    earlier Blade node's settings are replaced.

    Raises:
        BladeError: the model is under dynamic VRAM and cannot leave it.
        BackendUnavailable: `on_failure` is `error` and the backend cannot run here.
    """
    unet = getattr(model.model, "diffusion_model", None)
    if not isinstance(unet, UNetModel):
        message = (
            f"Blade optimizes SD1.5 and SDXL kinds of UNet; this model is a "
            f"{type(model.model).__name__} ({type(unet).__name__}). It runs unchanged."
        )
        logger.warning(message)
        say(message, node_id)
        return model
    if config.strict:
        session().engine.backends(config, model.load_device)
    clone = non_dynamic_clone(model)
    _remove_blade(clone)
    session().prepare(clone.model.diffusion_model)
    session().engine.expect(config, clone.load_device)
    switch_in_place(clone)
    attachment = Attachment(config, node_id)
    clone.set_attachments(_KEY, attachment)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, attachment.sample)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, attachment.wrap)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, _KEY, attachment.pre_run)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, _KEY, attachment.cleanup)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, attachment.detach)
    return clone


def is_optimized(model: ModelPatcher) -> bool:
    """Whether `model` runs through Blade."""
    return _KEY in model.attachments


def without_blade(model: ModelPatcher) -> ModelPatcher:
    """Return `model` as stock runs it: itself, or a clone without an earlier node's Blade."""
    if not is_optimized(model):
        return model
    clone = model.clone()
    _remove_blade(clone)
    return clone


def stats(model: ModelPatcher | None = None) -> dict[str, Any]:
    """What Blade did, as plain data: for `model` with the settings of its own node, or for all."""
    if model is None:
        return session().stats()
    attachment, fused = model.attachments.get(_KEY), model.attachments.get(FUSED)
    config = attachment.config if attachment is not None else None
    found = session().stats(model.model.diffusion_model, config)
    return found | {"loras": fused.report() if fused else None}


def _remove_blade(model: ModelPatcher) -> None:
    as_stock(model)
    model.remove_attachments(_KEY)
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY)
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, _KEY)
    model.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, _KEY)
    model.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, _KEY)
    model.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _KEY)
