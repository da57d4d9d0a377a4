"""What a module computes, without its weights' values, as nested tuples that can be hashed.

Everything that a module holds counts: classes and the code of their `forward`, plain
attributes, parameter names, shapes and dtypes. What cannot be described raises, so that a
module with unknown state is never taken for another one.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .errors import UnknownStructure
from .key import digest

# nn.Module's own bookkeeping: parameters, buffers and children are described by themselves,
# hooks are refused below, the rest is for saving, loading and training.
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def describe(module: nn.Module, *, ignore: Collection[str] = ()) -> tuple[Any, ...]:
    """Return the structure of `module` and all its children.

    ignore: names of attributes that do not change what is computed; the caller knows why.

    Raises:
        UnknownStructure: a child holds hooks, a replaced `forward`, a tensor subclass, or an
            attribute of a type that has no description.
    """
    classes = describe_classes(module)
    return tuple(
        (name, classes[type(child)], *_attributes(name, child, ignore), *_tensors(name, child))
        for name, child in module.named_modules()
    )


def describe_classes(module: nn.Module) -> dict[type[nn.Module], tuple[Any, ...]]:
    """Return each class in `module` with its name and a digest of its methods' code.

    A class that another pack patched keeps its name but not its code.
    """
    return {kind: _class(kind) for kind in {type(child) for child in module.modules()}}


def _class(kind: type[nn.Module]) -> tuple[Any, ...]:
    methods = []
    for base in kind.__mro__:
        # torch's own classes are covered by torch's version in the key.
        if not base.__module__.startswith(("torch.", "builtins")):
            for name, value in sorted(vars(base).items()):
                if isinstance(value, types.FunctionType):
                    methods.append((name, _code(value)))
    return (kind.__module__, kind.__qualname__, digest(tuple(methods)))


def _attributes(name: str, module: nn.Module, ignore: Collection[str]) -> list[Any]:
    for hooks in _HOOKS:
        if getattr(module, hooks, None):
            raise UnknownStructure(f"{_at(name, module)} has forward or backward hooks")
    if "forward" in module.__dict__:
        raise UnknownStructure(f"{_at(name, module)} has a replaced forward")
    found = []
    for key in sorted(module.__dict__):
        if key not in _MODULE_INTERNALS and key not in ignore:
            found.append((key, _value(module.__dict__[key], f"{_at(name, module)}.{key}")))
    return found


def _tensors(name: str, module: nn.Module) -> list[Any]:
    found: list[Any] = []
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
        for key, tensor in tensors.items():
            if tensor is None:
                found.append((kind, key, None))
            elif type(tensor) not in (nn.Parameter, torch.Tensor):
                raise UnknownStructure(
                    f"{_at(name, module)}.{key} is a {type(tensor).__name__}, not a plain tensor"
                )
            else:
                found.append((kind, key, tuple(tensor.shape), str(tensor.dtype)))
    return found


def _value(value: object, where: str) -> object:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, enum.Enum):
        return (type(value).__qualname__, value.name)
    if isinstance(value, (tuple, list)):  # torch.Size too
        return (type(value).__name__, *(_value(v, where) for v in value))
    if isinstance(value, dict):
        return ("dict", *((_value(k, where), _value(v, where)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted(repr(_value(v, where)) for v in value))
    if isinstance(value, type):
        return ("class", value.__module__, value.__qualname__)
    if isinstance(value, types.FunctionType):
        if value.__closure__:
            raise UnknownStructure(f"{where} is a function that closes over other objects")
        return ("function", value.__module__, value.__qualname__, _code(value))
    if isinstance(value, types.BuiltinFunctionType):
        return ("builtin", str(value.__module__), value.__qualname__)
    if isinstance(value, functools.partial):
        arguments = (_value(value.args, where), _value(value.keywords, where))
        return ("partial", _value(value.func, where), *arguments)
    raise UnknownStructure(f"{where} is a {type(value).__name__}, which Blade cannot describe")


@functools.lru_cache(maxsize=4096)
def _code(function: types.FunctionType) -> str:
    return digest(_code_object(function.__code__))


def _code_object(code: types.CodeType) -> object:
    constants = tuple(
        _code_object(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts
    )
    return (code.co_code.hex(), code.co_names, code.co_varnames, constants)


def _constant(value: object) -> str:
    # The order of a set's repr changes from process to process.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _at(name: str, module: nn.Module) -> str:
    return f"{name or 'the layer'} ({type(module).__name__})"
