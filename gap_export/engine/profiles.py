"""Optimisation profiles: the extents an engine must serve and the ones it is tuned for, from a graph's spec.

One profile covers a graph with named dimensions; a graph with static shapes needs none. The decoder gets two, because a
prompt of hundreds of tokens and a single generated token want different kernels: `prefill` over the whole range,
`decode` with the sequence pinned to one token. The cache is static in both. A decoder that drops tokens has a graph for each
instead, and so one profile in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.errors import EngineError, SessionError

SEQUENCE = "sequence"
"""The named dimension that counts the tokens of one decoder call."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, tuned-for and largest shape of one input."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies within, extent by extent."""
        return len(shape) == len(self.minimum) and all(
            low <= extent <= high for low, extent, high in zip(self.minimum, shape, self.maximum, strict=True)
        )

    @property
    def volume(self) -> int:
        """Product over dimensions of the number of extents it serves: how unspecific it is."""
        total = 1
        for low, high in zip(self.minimum, self.maximum, strict=True):
            total *= high - low + 1
        return total


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

    Attributes:
        name: `all`, `prefill` or `decode`.
        ranges: input name -> range of its shape, for every input of the graph.
        values: input name -> (smallest, tuned for, largest) value, for scalars that are extents of other tensors.
    """

    name: str
    ranges: Mapping[str, Range]
    values: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def holds(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether it serves a call with these input shapes."""
        return all(self.ranges[name].holds(shape) for name, shape in shapes.items())


def profiles_from_spec(spec: GraphSpec) -> tuple[Profile, ...]:
    """The profiles of a graph, in the order in which the engine numbers them.

    Raises:
        EngineError: a dimension whose values contradict each other, or a decoder that cannot take a single token.
    """
    dims = _named_dims(spec)
    _check_cache_is_static(spec)
    if not dims:
        return ()
    whole = {tensor.name: _range(tensor, {}) for tensor in spec.inputs}
    values = {
        tensor.name: (tensor.extent_of.minimum, tensor.extent_of.optimum, tensor.extent_of.maximum)
        for tensor in spec.inputs
        if tensor.extent_of is not None
    }
    if not (spec.aliased and SEQUENCE in dims):
        return (Profile("all", whole, values),)
    if dims[SEQUENCE].minimum > 1:
        raise EngineError(
            f"takes at least {dims[SEQUENCE].minimum} tokens per call, so it cannot decode token by token",
            subject=f"graph {spec.name}, dimension {SEQUENCE}",
            hint="export the decoder with a sequence that starts at 1",
        )
    single = {tensor.name: _range(tensor, {SEQUENCE: 1}) for tensor in spec.inputs}
    return (Profile("prefill", whole), Profile("decode", single))


def choose_profile(spec: GraphSpec, profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the most specific profile that serves a call.

    Args:
        spec: of the graph.
        profiles: as `profiles_from_spec` gives them.
        shapes: input name -> shape of the call.

    Raises:
        SessionError: no profile serves these shapes; names the input.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.holds(shapes)]
    if fitting:
        return min(fitting, key=lambda index: sum(profiles[index].ranges[name].volume for name in shapes))
    widest = profiles[0].ranges if profiles else {tensor.name: _range(tensor, {}) for tensor in spec.inputs}
    for name, shape in shapes.items():
        if not widest[name].holds(shape):
            low, high = widest[name].minimum, widest[name].maximum
            raise SessionError(
                f"has shape {list(shape)}, the engine serves {list(low)} to {list(high)}",
                subject=f"graph {spec.name}, input {name}",
                hint="send a smaller batch or a shorter prompt, or build with a larger --max-text, or max_batch in the recipe",
            )
    if profiles:
        raise SessionError(
            "no optimisation profile serves the shapes of all inputs together",
            subject=f"graph {spec.name}",
            hint="build the engine again with this version",
        )
    return 0


def _named_dims(spec: GraphSpec) -> dict[str, Dim]:
    dims: dict[str, Dim] = {}
    for tensor in spec.inputs:
        for dim in tensor.shape:
            if isinstance(dim, int):
                continue
            subject = f"graph {spec.name}, dimension {dim.name}"
            if not dim.minimum <= dim.optimum <= dim.maximum:
                raise EngineError(
                    f"needs minimum <= optimum <= maximum, not {dim.minimum}, {dim.optimum}, {dim.maximum}",
                    subject=subject,
                    hint="mend the limits in the recipe",
                )
            if dims.setdefault(dim.name, dim) != dim:
                raise EngineError(
                    f"has other limits in input {tensor.name} than in an input before it",
                    subject=subject,
                    hint="give dimensions that differ different names",
                )
    return dims


def _check_cache_is_static(spec: GraphSpec) -> None:
    """Slots lie on axis 2 of [B, heads, slots, head size]; only the batch may vary."""
    cached = set(spec.aliased.values())
    for tensor in spec.inputs:
        moving = [dim.name for dim in tensor.shape[1:] if not isinstance(dim, int)]
        if tensor.name in cached and moving:
            raise EngineError(
                f"has a dynamic dimension ({', '.join(moving)}) where TensorRT wants a static cache",
                subject=f"graph {spec.name}, input {tensor.name}",
                hint="export with a fixed capacity; only the batch of a cache may vary",
            )


def _range(tensor: TensorSpec, pinned: Mapping[str, int]) -> Range:
    def at(extents: Shape) -> Shape:
        return tuple(
            extent if isinstance(dim, int) else pinned.get(dim.name, extent)
            for dim, extent in zip(tensor.shape, extents, strict=True)
        )

    return Range(
        minimum=at(tensor.extents("minimum")),
        optimum=at(tensor.extents("optimum")),
        maximum=at(tensor.extents("maximum")),
    )
