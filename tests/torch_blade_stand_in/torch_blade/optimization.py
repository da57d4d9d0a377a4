"""`optimize`: export to TorchScript, freeze, compile clusters; what fails is passed over."""

import copy
import logging
import threading
from typing import Any

import torch
from torch import nn

from . import switches
from .config import Config, OptPipelines

_logger = logging.getLogger("torch_blade.logging")
_recording = threading.Lock()


@torch.no_grad()
def optimize(model: nn.Module, allow_tracing: Any = None, model_inputs: Any = None) -> nn.Module:
    assert isinstance(model, nn.Module), "Model must be nn.Module"
    config = Config.get_current_context_or_new()
    options = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    seen = {"training": model.training, "inputs": type(model_inputs), "tracing": allow_tracing}
    switches.optimized_with.append(seen | options | {"pipeline": config.optimization_pipeline})
    model = copy.deepcopy(model)
    if switches.rename:
        model = _Renamed(model)
    if not _recording.acquire(blocking=False):
        raise RuntimeError("Can't redefine method: record on class: RecordingObserver")
    try:
        if switches.during_optimize is not None:
            switches.during_optimize()
        exported = _export(model, allow_tracing, model_inputs)
    finally:
        _recording.release()
    if isinstance(exported, torch.jit.ScriptModule):
        if config.freeze_module and not model.training and not switches.skip_freezing:
            exported._reconstruct(torch._C._freeze_module(exported._c))
        OptPipelines.pipelines[config.optimization_pipeline](exported)
    return exported


def _export(model: nn.Module, allow_tracing: Any, inputs: Any) -> nn.Module:
    if allow_tracing:
        assert inputs is not None, "model_inputs can not be None when use torch.jit.trace"
        assert isinstance(inputs, (tuple, torch.Tensor)), "Model_inputs must be Tuple or Tensor"
        try:
            if switches.trace_error is not None:
                raise switches.trace_error
            return torch.jit.trace(model, inputs, check_trace=False, strict=False)
        except Exception as error:
            _logger.warning("%s\nFailed! Try to export it through torch.jit.script:", error)
    try:
        return torch.jit.script(model)
    except Exception as error:
        _logger.warning("%s\nFail to export torchscript on the top level", error)
    for name, child in model.named_children():
        try:
            setattr(model, name, torch.jit.script(child))
        except Exception as error:
            _logger.warning("%s\nSubmodule %s is not exported", error, name)
    return model


class _Renamed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.train(model.training)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.inner(*tensors)
