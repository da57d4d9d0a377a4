"""The systems that are compared: the nodes that a user puts behind the checkpoint loader."""

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.loaders import FusedLoras, LoraLoaders

Apply = Callable[[Any], Any]

REFERENCE = "eager"
"""The system that the results of all others are compared with."""


def _as_it_is(given: Any) -> Any:
    return given


@dataclass(frozen=True)
class System:
    """What is put on a model, and what the host is started with."""

    apply: Apply
    loras: type[LoraLoaders] | type[FusedLoras] = LoraLoaders
    """What stands before it where a scenario has LoRAs; each graph has its own."""
    controlnet: Apply = _as_it_is
    """What a ControlNet is made into before it is applied."""
    vae: Apply | None = None
    """What a VAE is made into; None where it decodes as stock, which is system eager's row."""
    arguments: tuple[str, ...] = ()
    dynamo: bool = False
    """Whether torch.compile guards its graphs: another shape must not make them dynamic."""
    restart: bool = False
    """Whether graphs of an earlier process are on disk."""
    idle: bool = False
    """Whether Blade has got ready before the first prompt, as in a server that waits for it."""
    allocator: str = "stock"
    """The allocator that it needs, where the host's choice does not work with it."""


def eager(model: Any) -> Any:
    """Stock ComfyUI."""
    return model


def torch_compile(model: Any, **options: Any) -> Any:
    """What the stock node TorchCompileModel does, through the host's own helper."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="inductor", **options)
    return clone


def torch_compile_max(model: Any) -> Any:
    """The same with the kernels' tuning that takes longest."""
    return torch_compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)


def reduce_overhead(model: Any) -> Any:
    """The best public recipe: the whole UNet channels-last, compiled with CUDA graphs."""
    import torch
    from comfy.patcher_extension import WrappersMP

    def new_step(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Nothing of the step before is needed: its CUDA graphs may use their memory again.
        torch.compiler.cudagraph_mark_step_begin()
        return executor(*args, **kwargs)

    model.model.diffusion_model.to(memory_format=torch.channels_last)
    clone = torch_compile(model, mode="reduce-overhead", dynamic=False)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark.step", new_step)
    return clone


def torch_compile_vae(vae: Any) -> Any:
    """What a pack's node for it does: the whole decoder, in place."""
    vae.first_stage_model.decoder.compile(backend="inductor")
    return vae


def _blade(loras: Any = FusedLoras, **options: Any) -> System:
    """Blade's nodes with their defaults, but failures raise instead of running eager.

    options: what differs in Blade's OptimizeConfig.
    """

    def config() -> Any:
        from blade.blade_core.config import OptimizeConfig

        return OptimizeConfig(**{"on_failure": "error", **options})

    def model(model: Any) -> Any:
        from blade.blade_core.host.model import optimize_model

        return optimize_model(model, config())

    def controlnet(controlnet: Any) -> Any:
        from blade.blade_core.host.controlnet import optimize_controlnet

        return optimize_controlnet(controlnet, config())

    def vae(vae: Any) -> Any:
        from blade.blade_core.host.optimize_vae import optimize_vae

        return optimize_vae(vae, config())

    return System(model, loras, controlnet, vae)


KERNELS = {
    f"blade-{name.replace('_', '-')}": name
    for name in (
        "joint_linear",
        "group_norm",
        "short_attention",
        "flash_attention",
        "geglu",
        "layer_norm",
        "late_bias",
    )
}
"""Blade with one of its own kernels alone: the system, and the kernel as Blade's config has it.
Asking that would import torch into a process that only starts others."""
WITHOUT = {system.replace("blade-", "blade-without-"): name for system, name in KERNELS.items()}
"""Blade with all of them but one: what that one is worth beside the others."""
NO_KERNELS = "blade-no-kernels"


def _all_but(kernel: str) -> tuple[str, ...]:
    return tuple(name for name in KERNELS.values() if name != kernel)


SYSTEMS: dict[str, System] = {
    REFERENCE: System(eager, vae=_as_it_is),
    "torch-compile": System(torch_compile, vae=torch_compile_vae, dynamo=True),
    "torch-compile-max": System(torch_compile_max, dynamo=True),
    # CUDA graph trees know no checkpoints of cudaMallocAsync, the host's choice on most GPUs.
    "reduce-overhead": System(reduce_overhead, dynamo=True, allocator="native"),
    "blade-loader": _blade(LoraLoaders),  # LoRAs by stock's nodes
    "blade": _blade(),
    # In a new process, with the graphs that "blade" left on disk in the same run.
    "blade-restart": replace(_blade(), restart=True),
    "blade-restart-idle": replace(_blade(), restart=True, idle=True),
    # Sampling as stock until other processes have compiled everything.
    "blade-background": _blade(compile="background"),
    # Without CUDA graphs: every kernel is launched from Python.
    "blade-uncaptured": _blade(capture=False),
    "blade-frozen": _blade(freeze_weights=True),
    # The traced graphs run by torch itself: what tracing and channels-last alone change.
    "blade-traced": _blade(backend="eager"),
    # Without the kernels of Blade's own in the graphs, with one of them, and with all but one.
    NO_KERNELS: _blade(kernels=()),
    **{system: _blade(kernels=(kernel,)) for system, kernel in KERNELS.items()},
    **{system: _blade(kernels=_all_but(kernel)) for system, kernel in WITHOUT.items()},
}


def find_system(name: str) -> System:
    """Return a system by name.

    `NAME-fast` is the same on a host that was started with `--fast`; `blade:option=True` is
    Blade with one Inductor option changed.

    Raises:
        ValueError: there is no such system.
    """
    base, _, option = name.partition(":")
    plain = base.removesuffix("-fast")
    if plain not in SYSTEMS or (option and not plain.startswith("blade")):
        raise ValueError(
            f"there is no system {name!r}; known are {', '.join(SYSTEMS)}, each also with -fast "
            "behind it, and blade:INDUCTOR_OPTION=VALUE"
        )
    system = SYSTEMS[plain]
    if base != plain:
        system = replace(system, arguments=("--fast",))
    if not option:
        return system
    vae = None if system.vae is None else _with_option(system.vae, option)
    return replace(system, apply=_with_option(system.apply, option), vae=vae)


def _with_option(apply: Apply, option: str) -> Apply:
    key, _, value = option.partition("=")

    def changed(model: Any) -> Any:
        from blade.blade_core.backends import standalone

        standalone.OPTIONS[key] = ast.literal_eval(value)
        return apply(model)

    return changed
