"""Layers that are alike: found out before any of them is left out of a trace, never assumed.

A decoder has dozens of layers, and tracing each takes as long as the first. Where they are alike, the first, the next two and the last of a
run are traced, those between are passed by (`passed_by`), and `graph/repeat.py` puts copies of a traced one in their place. Alike
(`check_alike`) means:

    as modules      the same types, parameters and buffers by name, shape and element type, the same settings
    as they run     the same operators with the same operands, in a call of the whole module on fake tensors

The second sees what no attribute says: a mask that the model chooses by the number of a layer, features added between two of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gap_export.bundle.spec import GraphSpec

_TRACED_INSIDE = 2
"""Layers between the first and the last of a run that are traced: two, so that they can be compared as graphs."""
_PLAIN = (bool, int, float, complex, str, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_OF_LAYER = re.compile(r"(\w+\.)(\d+)(\.\w+)")
"""Name of an input or output that is a layer's own."""
_PARTS = ("_parameters", "_buffers", "_modules")


class Unlike(Exception):
    """Layers are not alike, or not known to be; says which, and in what."""


@dataclass(frozen=True)
class LayerStack:
    """Layers that a module calls one after another, each with what the one before gave.

    Attributes:
        path: of their `nn.ModuleList` in the module.
        runs: of numbers of layers; between two runs something else may happen. The first and the last of a run may be unlike
            the others.
    """

    path: str
    runs: tuple[range, ...]

    def name(self, number: int) -> str:
        """Of a layer, in the module."""
        return f"{self.path}.{number}"

    @property
    def repeated(self) -> tuple[range, ...]:
        """Of every run that is long enough, the layers that are to be alike: all but its first and its last."""
        inner = (run[1:-1] for run in self.runs)
        return tuple(run for run in inner if len(run) > _TRACED_INSIDE)

    @property
    def passed_by(self) -> tuple[int, ...]:
        """Numbers of the layers that need not be traced."""
        return tuple(number for run in self.repeated for number in run[_TRACED_INSIDE:])


def layer_of(name: str) -> int | None:
    """Number of the layer whose cache an input or output is (`past.2.key`: 2); None for what belongs to none."""
    match = _OF_LAYER.fullmatch(name)
    return None if match is None else int(match[2])


def renumbered(name: str, old: int, new: int) -> str:
    """What another layer calls its own: `past.2.key` -> `past.7.key`; any other name as it is."""
    return _OF_LAYER.sub(rf"\g<1>{new}\g<3>", name) if layer_of(name) == old else name


# Whether they are alike


def check_alike(
    module: nn.Module, stack: LayerStack, call: Callable[[], object], inputs: Mapping[str, Tensor]
) -> None:
    """Refuse layers that differ.

    Args:
        module: with fake parameters.
        stack: of it.
        call: calls the module on `inputs`.
        inputs: by name; fake, of the parameters' mode, their extents plain numbers.

    Raises:
        Unlike: they do.
    """
    layers = dict(module.named_modules()).get(stack.path)
    most = max(run.stop for run in stack.runs)
    if not isinstance(layers, nn.ModuleList) or len(layers) < most:
        raise Unlike(f"{stack.path} is no list of {most} layers")
    for run in stack.repeated:
        for number in run[1:]:
            difference = _difference((run[0], layers[run[0]]), (number, layers[number]))
            if difference:
                raise Unlike(f"{stack.name(number)} differs from {stack.name(run[0])} in {difference}")
    logs = _operators(module, stack, call, inputs)
    for run in stack.repeated:
        for number in run[1:]:
            if logs[number] != logs[run[0]]:
                raise Unlike(
                    f"{stack.name(number)} is not computed as {stack.name(run[0])} is, or is given something else"
                )


def _difference(one: tuple[int, nn.Module], other: tuple[int, nn.Module]) -> str:
    """The first thing in which two layers, each with its number, differ; "" where there is none."""
    parts, others = (dict(layer.named_modules()) for _, layer in (one, other))
    if list(parts) != list(others):
        return f"its modules: {min(parts.keys() ^ others.keys(), default='their order')}"
    for name, part in parts.items():
        there = others[name]
        where = name or "itself"
        if type(part) is not type(there):
            return f"the type of {where}"
        if _shapes(part) != _shapes(there):
            return f"the parameters or buffers of {where}"
        settings, settings_there = (
            {key: value for key, value in vars(each).items() if key not in _PARTS} for each in (part, there)
        )
        if settings.keys() != settings_there.keys():
            return f"the settings of {where}: {min(settings.keys() ^ settings_there.keys())}"
        for key, value in settings.items():
            if not _same(value, settings_there[key], one[0], other[0]):
                return f"{key} of {where}"
        if not all(_equal(value, there._buffers[key]) for key, value in part._buffers.items()):
            return f"a buffer of {where}"
    return ""


def _shapes(module: nn.Module) -> list[Hashable]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(name, None if each is None else (tuple(each.shape), each.dtype)) for name, each in own]


def _same(value: object, other: object, number: int, other_number: int) -> bool:
    """Equal, or either the number of its own layer."""
    if type(value) is int and type(other) is int and (value, other) == (number, other_number):
        return True
    return _equal(value, other)


def _equal(value: object, other: object) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    try:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return value.dtype == other.dtype and torch.equal(value, other)
        if isinstance(value, functools.partial) and isinstance(other, functools.partial):
            return value.func is other.func and (value.args, value.keywords) == (other.args, other.keywords)
        return bool(value == other)
    except Exception:  # what cannot be compared is not known to be equal
        return False


def _operators(
    module: nn.Module, stack: LayerStack, call: Callable[[], object], inputs: Mapping[str, Tensor]
) -> dict[int, list[Hashable]]:
    """Layer -> what it dispatched, in a call of the module."""
    wanted = [number for run in stack.repeated for number in run]
    # The layer before a run as well: what it gives is what the first of the run is given.
    watched = sorted({*wanted, *(run[0] - 1 for run in stack.repeated)})
    log, layers = _Log(inputs, last=watched[-1]), module.get_submodule(stack.path)
    with ExitStack() as hooks:
        for number in watched:
            layer = layers.get_submodule(str(number))
            before = layer.register_forward_pre_hook(
                lambda layer, args, kwargs, number=number: log.enter(number, layer, args, kwargs),
                with_kwargs=True,
            )
            after = layer.register_forward_hook(lambda layer, args, output: log.leave(output))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        try:
            with torch.no_grad(), log, suppress(_Seen):
                call()
        except Exception as error:  # torch raises a dozen unrelated types here
            raise Unlike(f"{stack.path} cannot be run on fake tensors ({type(error).__name__})") from error
    absent = [number for number in wanted if number not in log.operators]
    if absent:
        raise Unlike(f"{stack.name(absent[0])} is not called")
    return log.operators


class _Seen(Exception):
    """All layers were called; what follows them need not run."""


class _Log(TorchDispatchMode):
    """Writes down what layers dispatch. Tensors are told apart by what they are to the layer, numbers by their value.

    Args:
        inputs: of the whole module.
        last: number of the layer after which nothing more is to be seen.

    Attributes:
        operators: layer -> what it was called with, and every operator with its operands, and the shapes and types that it gave.
    """

    def __init__(self, inputs: Mapping[str, Tensor], last: int) -> None:
        super().__init__()
        self.operators: dict[int, list[Hashable]] = {}
        self._inputs, self._last = inputs, last
        self._current: tuple[int, list[Hashable]] | None = None
        self._known: dict[int, Hashable] = {}
        self._before: object = None
        self._held: list[object] = []  # a tensor that is gone could lend its identity to another

    def enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer is called."""
        self._known = {
            id(tensor): ("input", renumbered(name, number, -1)) for name, tensor in self._inputs.items()
        }
        own = [*layer.named_parameters(), *layer.named_buffers()]
        self._known |= {id(tensor): ("own", name) for name, tensor in own}
        if args and args[0] is self._before:
            self._known[id(args[0])] = ("given by the layer before",)
        self._held.append((args, kwargs))
        self._current = number, [self._place([args, sorted(kwargs.items())])]

    def leave(self, output: object) -> None:
        """It gave something."""
        assert self._current is not None
        number, operators = self._current
        self.operators[number] = [*operators, self._place(output)]
        self._held.append(output)
        self._before, self._current = output, None
        if number == self._last:
            raise _Seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        made = func(*args, **(kwargs or {}))
        if self._current is None or func.namespace == "prim":  # where a tensor lies is asked now and then
            return made
        operators = self._current[1]
        operands = self._place(args), self._place(sorted((kwargs or {}).items()))
        several = made if isinstance(made, (list, tuple)) else [made]
        forms = [
            (str(each.shape), each.dtype) if isinstance(each, Tensor) else self._place(each)
            for each in several
        ]
        self._held.append((args, kwargs, made))
        for place, each in enumerate(several):
            self._known.setdefault(id(each), ("made", len(operators), place))
        operators.append((str(func), *operands, tuple(forms)))
        return made

    def _place(self, value: object) -> Hashable:
        """What stands for an operand."""
        if isinstance(value, (list, tuple)):
            return tuple(self._place(each) for each in value)
        if isinstance(value, _PLAIN) or value is None:
            return type(value).__name__, repr(value)
        return self._known.get(id(value), ("from outside", id(value)))


# Leaving them out


def without_passed_by(spec: GraphSpec, stack: LayerStack) -> GraphSpec:
    """A spec without the caches of layers that need not be traced."""
    absent = set(stack.passed_by)
    inputs, outputs = (
        tuple(tensor for tensor in side if layer_of(tensor.name) not in absent)
        for side in (spec.inputs, spec.outputs)
    )
    aliased = {output: given for output, given in spec.aliased.items() if layer_of(output) not in absent}
    return spec.model_copy(update={"inputs": inputs, "outputs": outputs, "aliased": aliased})


@contextmanager
def passed_by(module: nn.Module, spec: GraphSpec, stack: LayerStack) -> Iterator[None]:
    """For as long as this takes, a layer that need not be traced is one node, and has no cache.

    Args:
        module: is then called as `without_passed_by(spec, stack)` says.
        spec: of the module.
        stack: of the module.
    """
    layers: Any = module.get_submodule(stack.path)
    own = {number: layers[number] for number in stack.passed_by}
    forward, patched = module.forward, vars(module).get("forward")
    absent = [[layer_of(tensor.name) in own for tensor in side] for side in (spec.inputs, spec.outputs)]

    @functools.wraps(forward)
    def with_gaps(*args: Tensor) -> tuple[Tensor, ...]:
        given = iter(args)
        outputs = forward(*(None if gap else next(given) for gap in absent[0]))
        return tuple(output for output, gap in zip(outputs, absent[1], strict=True) if not gap)

    try:
        for number in own:
            layers[number] = _PassedBy()
        if any(map(any, absent)):
            module.forward = with_gaps
        yield
    finally:
        for number, layer in own.items():
            layers[number] = layer
        if vars(module).pop("forward", None) is not None and patched is not None:
            module.forward = patched


class _PassedBy(nn.Module):
    """In the place of a layer: one node, a copy, that the scope of the layer is written on.

    An operator of our own would say more, and takes torch ten times as long.
    """

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """What follows is as if the layer had been there."""
        return hidden.clone()
