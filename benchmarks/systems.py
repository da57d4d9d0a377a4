"""The systems that are compared, each as a function MODEL -> MODEL of a user's choices."""

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


def blade(model: Any) -> Any:
    """BladeOptimizeModel with its defaults, but failures raise instead of running eager."""
    from blade.blade_core.config import OptimizeConfig
    from blade.blade_core.host.model import optimize_model

    return optimize_model(model, OptimizeConfig(on_failure="error"))


SYSTEMS: dict[str, Callable[[Any], Any]] = {
    "eager": eager,
    "torch-compile": torch_compile,
    "blade": blade,
}
