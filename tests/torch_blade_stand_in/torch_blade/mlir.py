"""The DISC pipeline: a cluster of supported operations becomes one engine."""

import logging
import os
from pathlib import Path

import torch

from . import build, switches
from .config import OptPipelines

_ENGINE = "torch_blade::engine"
_UNSUPPORTED = torch.bfloat16
_MIN_NODES = 3

_logger = logging.getLogger("torch_blade.logging")
_available = "DISC" in build.pipelines

# The real one has a class of engines; as here, TorchScript cannot load them before it is known.
library = torch.library.Library("torch_blade", "DEF")
library.define("engine(Tensor x) -> Tensor")


def _engine(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    return x if switches.during_run is None else switches.during_run(x)


library.impl("engine", _engine, "CompositeExplicitAutograd")

_flag = os.environ.get("TORCH_BLADE_ENABLE_COMPILATION_CACHE", "")
disc_cache: dict[str, bytes] | None = {} if _flag.lower() in ("1", "true", "on") else None


def is_available() -> bool:
    return _available


def num_engines(module: torch.jit.ScriptModule) -> int:
    if not _available:
        raise TypeError("startswith first arg must be str or a tuple of str, not NoneType")
    return len(module._c.forward.graph.findAllNodes(_ENGINE))


def num_compiled_nodes(module: torch.jit.ScriptModule) -> int:
    return len(_operations(module)) if num_engines(module) else 0


def _optimize(module: torch.jit.ScriptModule) -> None:
    graph = module._c.forward.graph
    torch._C._jit_pass_inline(graph)
    values = [*graph.inputs(), *(v for node in graph.nodes() for v in node.outputs())]
    tensors = [v for v in values if v.type().kind() == "TensorType"]
    dtypes = {tensor.dtype for tensor in module.state_dict().values()}
    dtypes |= {v.type().dtype() for v in tensors}
    if _UNSUPPORTED in dtypes or len(_operations(module)) < _MIN_NODES:
        return
    try:
        _compile()
    except Exception as error:
        _logger.warning(error)
        return
    first = tensors[0]
    engine = graph.create(_ENGINE, [first], 1)
    graph.prependNode(engine)
    first.replaceAllUsesAfterNodeWith(engine, engine.output())


def _compile() -> None:
    (Path(__file__).parent / "disc_compiler_main").read_bytes()
    if switches.compile_error is not None:
        raise switches.compile_error


def _operations(module: torch.jit.ScriptModule) -> list[object]:
    nodes = module._c.forward.graph.nodes()
    return [node for node in nodes if node.kind().startswith("aten::")]


for _name in build.pipelines:
    OptPipelines.register_pipeline(_name, _optimize)
