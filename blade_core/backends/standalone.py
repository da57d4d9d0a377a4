"""A traced graph to TorchInductor's code: what it is asked for, and what comes of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..graph import Compiled, GraphFunction, GraphRequest

# For inference, one graph a unit, launched one by one, where launches cost more than kernels;
# measured in docs/log.md.
OPTIONS: dict[str, Any] = {
    # The host owns streams and memory; a whole step is captured outside, not graph by graph.
    "triton.cudagraphs": False,
    # Key and host adapter have checked sizes and strides; asserting again costs launches' time.
    "size_asserts": False,
    # Outputs keep the strides that were traced: the next unit's graph counts on them.
    "keep_output_stride": True,
    # A GroupNorm in two kernels instead of four: each reduction fills the GPU in one go. (Not so
    # for images as large as a VAE's, see patches_for.)
    "split_reductions": False,
    # One configuration for each kernel that goes through elements one by one. Of several, each is
    # compiled, and all are run while other processes use the GPU: not the time to compare them.
    "triton.autotune_pointwise": False,
    # For the same reason no product is tried with padded sizes: rows of weights are aligned.
    "shape_padding": False,
    # On channels-last data a 1x1 convolution is a matrix product without any copy.
    "conv_1x1_as_mm": True,
}

_NEWER: dict[str, Any] = {
    # Blade's own kernels are stored and launched as Inductor's are, so that loading a graph
    # compiles no launchers (torch 2.11).
    "static_launch_user_defined_triton_kernels": True,
}
"""What not every torch knows."""

_LARGE_IMAGE = 256 * 256
"""Rows and columns from which on a group of channels is too much for one program to reduce."""

_UNKNOWN_BYTES = 4 * 2**20
"""What a graph counts with that cannot be stored, and so cannot be measured: a typical size."""


def build(module: torch.fx.GraphModule, request: GraphRequest) -> Compiled:
    """Compile `module`, traced from `request`: (*weights, *inputs) to one tensor."""
    inputs = list(request.inputs)
    patches = patches_for(inputs)
    if request.frozen:
        module = _fold_weights(module, request.weights)
        patches["freezing"] = True
    else:
        inputs = [*request.weights, *inputs]
    with torch.no_grad():
        call, artifact = _compile(module, inputs, patches, storable=not request.frozen)
    nbytes = _UNKNOWN_BYTES if artifact is None else len(artifact)
    if request.frozen:
        nbytes += sum(w.nbytes for w in request.weights)
    return Compiled(function_of(call, frozen=request.frozen), artifact, nbytes)


def patches_for(arguments: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Inductor's options for a graph of such arguments."""
    large = any(t.ndim == 4 and t.shape[2] * t.shape[3] >= _LARGE_IMAGE for t in arguments)
    return all_options() | {"split_reductions": OPTIONS["split_reductions"] or large}


def all_options() -> dict[str, Any]:
    """What this torch knows of Blade's options for Inductor."""
    from torch._inductor import config

    return OPTIONS | {key: value for key, value in _NEWER.items() if hasattr(config, key)}


def build_artifact(module: torch.fx.GraphModule, patches: dict[str, Any]) -> bytes:
    """The artifact of a graph whose arguments are known by their form only."""
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]  # by its name in standalone_compile
    fake = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(module.graph.nodes)))
    output.args = ((output.args[0],),)  # torch before 2.11 looks for several
    module.recompile()
    with torch.no_grad():
        compiled = torch._inductor.standalone_compile(
            module, fake, dynamic_shapes="from_graph", options={"config_patches": patches}
        )
    artifact = _artifact(compiled)
    if artifact is None:
        raise RuntimeError("torch cannot store this graph")
    return artifact


def keeps_graphs() -> bool:
    """Whether this torch (2.8 or newer) can hand a compiled graph to another process."""
    return hasattr(torch._inductor, "standalone_compile")


def function_of(call: Callable[..., Any], *, frozen: bool) -> GraphFunction:
    """What Inductor gives as Blade calls it."""

    def run(weights: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return _only(call(*weights, *inputs))

    def run_frozen(_: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return _only(call(*inputs))

    return run_frozen if frozen else run


def _only(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _compile(
    module: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    patches: dict[str, Any],
    *,
    storable: bool,
) -> tuple[Callable[..., Any], bytes | None]:
    if not storable or not keeps_graphs():
        call: Any = torch._inductor.compile(module, [*inputs], options=patches)
        return call, None
    compiled = torch._inductor.standalone_compile(
        module,
        [*inputs],
        dynamic_shapes="from_example_inputs",
        options={"config_patches": patches},
    )
    return compiled, _artifact(compiled)


def _artifact(compiled: Any) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "graph")
        try:
            compiled.save(path=path, format="binary")
        except RuntimeError:  # what it says of a graph that holds something not serialisable
            return None
        with open(path, "rb") as file:
            return file.read()


def _fold_weights(
    module: torch.fx.GraphModule, weights: Sequence[torch.Tensor]
) -> torch.fx.GraphModule:
    """Turn the leading placeholders into attributes, which Inductor's freezing folds."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for index, (node, weight) in enumerate(zip(placeholders, weights, strict=False)):
        name = f"weight_{index}"
        # A copy: freezing keeps some weights as they are, and the live ones may be edited.
        module.register_parameter(name, nn.Parameter(weight.detach().clone(), requires_grad=False))
        with module.graph.inserting_before(node):
            attribute = module.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        module.graph.erase_node(node)
    module.recompile()
    return module
