"""The systems that are compared, each as a function MODEL -> MODEL of a user's choices."""

import ast
from collections.abc import Callable
from typing import Any


def eager(model: Any) -> Any:
    """Stock ComfyUI."""
    return model


def torch_compile(model: Any) -> Any:
    """What the stock node TorchCompileModel does, through the host's own helper."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="inductor")
    return clone


def blade(model: Any, **options: Any) -> Any:
    """BladeOptimizeModel with its defaults, but failures raise instead of running eager."""
    from blade.blade_core.config import OptimizeConfig
    from blade.blade_core.host.model import optimize_model

    return optimize_model(model, OptimizeConfig(**{"on_failure": "error", **options}))


def blade_frozen(model: Any) -> Any:
    """The same with the weights folded into the graphs."""
    return blade(model, freeze_weights=True)


def blade_traced(model: Any) -> Any:
    """The traced graphs run by torch itself: what tracing and channels-last alone change."""
    return blade(model, backend="eager")


SYSTEMS: dict[str, Callable[[Any], Any]] = {
    "eager": eager,
    "torch-compile": torch_compile,
    "blade": blade,
    "blade-frozen": blade_frozen,
    "blade-traced": blade_traced,
}


def find_system(name: str) -> Callable[[Any], Any]:
    """Return a system by name; `blade:option=True` is Blade with one Inductor option changed."""
    base, _, option = name.partition(":")
    if option:
        from blade.blade_core.backends import inductor

        key, _, value = option.partition("=")
        inductor._OPTIONS[key] = ast.literal_eval(value)
    return SYSTEMS[base]
