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
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from .errors import UnknownStructure
from .key import digest

# nn.Module's own bookkeeping: parameters, buffers and children are described by themselves,
# hooks are refused below, the rest is for saving, loading and training.
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_CLASS_INTERNALS = frozenset(vars(type("_", (), {}))) | {
    "__annotations__",
    "__annotate_func__",
    "__annotations_cache__",
    "__firstlineno__",
    "__static_attributes__",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def describe(module: nn.Module, *, ignore: Collection[str] = ()) -> tuple[Any, ...]:
    """Return the structure of `module` and all its children.

    ignore: names of attributes that do not change what is computed; the caller knows why.

    Raises:
        UnknownStructure: a child holds hooks, a replaced `forward`, a tensor subclass, or an
            attribute of a type that has no description.
    """
    classes = describe_classes(module)
    for *_, problem in classes.values():
        if problem is not None:
            raise UnknownStructure(problem)
    # What is held twice gets one number: names alone do not tell which two are one.
    numbers: dict[int, int] = {}
    return tuple(
        (
            name,
            numbers.setdefault(id(child), len(numbers)),
            classes[type(child)],
            *_attributes(name, child, ignore),
            *_tensors(name, child, numbers),
        )
        for name, child in module.named_modules(remove_duplicate=False)
    )


def describe_function(function: Any) -> object:
    """Return what `function` computes: its code, its defaults, and what it closes over.

    Raises:
        UnknownStructure: among these is something that has no description.
    """
    return _closure(function, {})


def _closure(value: Any, seen: dict[types.FunctionType, int]) -> object:
    where = "a function that an attention function uses"
    if isinstance(value, functools.partial):
        given = (value.func, *value.args, *sorted(value.keywords.items()))
        return ("partial", *(_closure(v, seen) for v in given))
    if not isinstance(value, types.FunctionType):
        return _value(value, where)
    if value in seen:  # functions may hold each other
        return ("again", seen[value])
    seen[value] = len(seen)
    try:
        held = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError as error:
        raise UnknownStructure(f"{where} is not complete yet") from error
    defaults = (*(value.__defaults__ or ()), *sorted((value.__kwdefaults__ or {}).items()))
    return (
        *("function", value.__module__, value.__qualname__, _code(value.__code__)),
        *(_closure(v, seen) for v in (*held, *defaults)),
    )


def reads_training(module: nn.Module) -> bool:
    """Whether a module in `module` may compute something else in training mode than in eval mode.

    Graphs are made in eval mode, but ComfyUI leaves some models in training mode.
    """
    kinds = {type(m) for m in modules_of(module) if getattr(m, "p", None) != 0.0}  # dropout
    return any(_class_reads_training(kind) for kind in kinds)


def _class_reads_training(kind: type[nn.Module]) -> bool:
    members = [
        member
        for base in kind.__mro__
        if base is not nn.Module  # which has `train` and `eval` themselves
        for member in vars(base).values()
    ]
    functions = (function for member in members for function in _functions(member))
    return any(_code_reads_training(function.__code__) for function in functions)


@functools.lru_cache(maxsize=4096)
def _code_reads_training(code: types.CodeType) -> bool:
    return "training" in (*code.co_names, *code.co_consts) or any(
        _code_reads_training(c) for c in code.co_consts if isinstance(c, types.CodeType)
    )


def modules_of(root: nn.Module) -> list[nn.Module]:
    """All modules of `root`, each once, in no order that counts.

    nn.Module.modules gives them through nested generators; this is asked at each run's start.
    """
    found, seen = [root], {root}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def describe_classes(module: nn.Module) -> dict[type[nn.Module], tuple[Any, ...]]:
    """Return each class in `module` with its name, a digest of its members, and a problem.

    A class that another pack patched keeps its name but not its code. The problem is a text if
    a member cannot be described, else None.
    """
    kinds = set(map(type, modules_of(module)))
    # Each base once: nn.Module has more members than all others together.
    parts = {base: _own_members(base) for base in {b for kind in kinds for b in kind.__mro__}}
    return {kind: _class(kind, [parts[base] for base in kind.__mro__]) for kind in kinds}


def _class(kind: type[nn.Module], parts: list[tuple[list[Any], str | None]]) -> tuple[Any, ...]:
    members = [member for own, _ in parts for member in own]
    problem = next((problem for _, problem in parts if problem is not None), None)
    return (kind.__module__, kind.__qualname__, digest(tuple(members)), problem)


def _own_members(base: type) -> tuple[list[Any], str | None]:
    """What a class itself adds to its bases, and a problem with that."""
    found: list[tuple[str, Any]] = list(vars(base).items())
    # torch's own code is covered by torch's version in the key, unless someone replaced it.
    if base.__module__.startswith(("torch.", "builtins")):
        found = [(name, value) for name, value in found if _is_foreign(value)]
    members: list[Any] = []
    problem = None
    for name, value in sorted(found, key=itemgetter(0)):
        if name not in _CLASS_INTERNALS:
            try:
                members.append((name, _member(value, f"{base.__qualname__}.{name}")))
            except UnknownStructure as error:
                problem = str(error)
    return members, problem


def _functions(member: object) -> list[types.FunctionType]:
    """The functions that a member of a class is, or is made of."""
    names = ("__func__", "fget", "fset")
    parts = (member, *(getattr(member, name, None) for name in names))
    return [part for part in parts if isinstance(part, types.FunctionType)]


def _is_foreign(value: object) -> bool:
    """Whether a member of a class of torch was put there by somebody else."""
    return isinstance(value, types.FunctionType) and not value.__module__.startswith("torch.")


def _member(value: object, where: str) -> object:
    if isinstance(value, (staticmethod, classmethod)):
        return (type(value).__name__, _member(value.__func__, where))
    if isinstance(value, property):
        return ("property", *(_value(f, where) for f in (value.fget, value.fset)))
    return _value(value, where)


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


def _tensors(name: str, module: nn.Module, numbers: dict[int, int]) -> list[Any]:
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
                number = numbers.setdefault(id(tensor), len(numbers))
                found.append((kind, key, number, tuple(tensor.shape), str(tensor.dtype)))
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
        return ("function", value.__module__, value.__qualname__, *_function(value, where))
    if isinstance(value, types.BuiltinFunctionType) and (
        value.__self__ is None or isinstance(value.__self__, (type, types.ModuleType))
    ):
        return ("builtin", str(value.__module__), value.__qualname__)
    if isinstance(value, functools.partial):
        arguments = (_value(value.args, where), _value(value.keywords, where))
        return ("partial", _value(value.func, where), *arguments)
    raise UnknownStructure(f"{where} is a {type(value).__name__}, which Blade cannot describe")


def _function(function: types.FunctionType, where: str) -> tuple[Any, ...]:
    """Code and defaults. A closure is refused, except for the class that `super()` needs."""
    if any(name != "__class__" for name in function.__code__.co_freevars):
        raise UnknownStructure(f"{where} is a function that closes over other objects")
    defaults = (function.__defaults__, function.__kwdefaults__)
    return (_code(function.__code__), *(_value(d, where) for d in defaults))


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    return digest(_code_object(code))


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
