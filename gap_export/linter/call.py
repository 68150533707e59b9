"""One call of a decoder: what every graph input holds, made from names, types and shapes, so that all of them fit together.

A part of a graph, or the whole of it, is evaluated for so many rows of so many new tokens after so long a past. Whatever exporter wrote it,
its lengths, masks and caches then speak of the same call. Names are those of transformers, optimum, ONNX Runtime's generation
tools and this project.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import first_line
from gap_export.linter.dataflow import is_float, name_of
from gap_export.linter.limits import MOST_FED

Array = NDArray[Any]

_MROPE = 3
"""Ids of a token under M-RoPE: time, height, width."""
SMALLEST_VOCABULARY = 16
"""Token ids stay below this."""
_HIDDEN = -1e4
"""What a mask that is added to scores holds where nothing may be seen; float16 holds it too."""
_PAST = re.compile(r"past|cache|key_value")
_KEYS = re.compile(r"(^|[^a-z])(k|v|kv|keys?|values?|prev(ious)?|mem(ory)?)([^a-z]|$)")
"""Names of a cache that are one only where it has a row per head."""
_SLOT = re.compile(r"write_ind")
"""Inputs that say where in a buffer new keys go; the buffer is then longer than what is in it."""
_MASK = re.compile(r"mask|(attn|attention|causal|position|score)_?bias|^bias$")
_COUNTS = (
    (re.compile(r"write_ind|past_(sequence_length|length|lens?$)|start_pos|cur_len"), lambda c: c.past),
    (re.compile(r"seqlens?_k|past_seq_len"), lambda c: c.past + c.tokens - 1),
    (re.compile(r"total_seq|total_len|kv_len|context_len"), lambda c: c.past + c.tokens),
    (re.compile(r"last_ind"), lambda c: c.tokens - 1),
    (re.compile(r"logits_to_keep|query_len|seq_len|sequence_length"), lambda c: c.tokens),
    (re.compile(r"stage_slots"), lambda c: c.tokens),  # no image, and nothing dropped
)
"""What integers of one value, or one per row, count; the first that matches."""


class CannotFeed(Exception):
    """An input cannot be made up; the text says why."""


@dataclass(frozen=True)
class Call:
    """The extents of one call.

    Attributes:
        rows: sequences of the batch, B.
        tokens: new tokens of each, S.
        past: tokens that came before, P.
    """

    rows: int = 1
    tokens: int = 7
    past: int = 0

    @property
    def slots(self) -> int:
        """Of a buffer of keys: some are free after the call."""
        return self.past + self.tokens + 2


def is_token(value: ir.Value) -> bool:
    """Whether an input carries the tokens, by its name."""
    return name_of(value).lower() in ("input_ids", "inputs_embeds", "input_embeds", "hidden_states", "inputs")


class Inputs:
    """The inputs of a decoder graph.

    Args:
        inputs: all that a caller feeds.
        ids: the position-ids input.

        tokens: inputs that carry the tokens, whatever their names; by name where left out.

    Attributes:
        ids: the position-ids input.
        tokens: inputs that carry the tokens.
    """

    def __init__(
        self, inputs: Iterable[ir.Value], ids: ir.Value | None, tokens: Iterable[ir.Value] = ()
    ) -> None:
        self._inputs, self.ids = tuple(inputs), ids
        given = set(tokens)
        self.tokens = tuple(v for v in self._inputs if v in given or is_token(v))
        self._known: dict[str, int] = {}
        self._symbols: dict[str, str] = {}
        """Name of a dimension -> `rows`, `tokens`, `past` or `slots`."""
        self._nameless: dict[tuple[ir.Value, int], str] = {}
        """The same of dimensions without a name, which are told by where they stand."""
        by_slot = any(_SLOT.search(name_of(value).lower()) for value in self._inputs)
        for value in sorted(self._inputs, key=lambda v: v is not ids):
            if value is ids:
                axes = [axis for axis in range(_rank(value)) if axis != self.component_axis]
                for axis, what in zip(reversed(axes), ("tokens", "rows"), strict=False):
                    self._name(value, axis, what)
            elif value in self.tokens:
                self._name(value, -1 if is_float(value) is False else 1, "tokens")
                self._name(value, 0, "rows")
        for value in self._inputs:
            if self.is_past(value):
                self._name(value, 0 if _rank(value) == 4 else 1, "rows")
                for axis in range(_rank(value)):
                    self._name(value, axis, "slots" if by_slot else "past")

    def learn(self, dim: ir.SymbolicDim | int, extent: int) -> None:
        """Note that a dimension with a name always has one extent."""
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            self._known[dim.value] = extent

    def static(self, what: str) -> int | None:
        """The number of rows or of tokens, where the graph fixes it."""
        value = self.ids
        if value is None or value.shape is None:
            return None
        dims = [dim for axis, dim in enumerate(value.shape) if axis != self.component_axis]
        if not dims and what == "tokens":  # one number is one token's
            return 1
        place = {"tokens": 1, "rows": 2}[what]
        dim = dims[-place] if len(dims) >= place else None
        return dim if isinstance(dim, int) and dim > 0 else None

    @property
    def has_rows(self) -> bool:
        """Whether the ids are those of a batch."""
        return _rank(self.ids) - (self.component_axis is not None) >= 2

    @property
    def components(self) -> int:
        """How many ids a token has: 3 under M-RoPE, or 4 with the place in the text before them; else 1."""
        if self.component_axis is None or self.ids is None or self.ids.shape is None:
            return 1
        extent = self.ids.shape[self.component_axis]
        return extent if isinstance(extent, int) else _MROPE

    @property
    def component_axis(self) -> int | None:
        """Axis along which a token's ids lie where it has several: [3, B, S], wherever the 3 stands, or [3, S] of one sequence."""
        shape = self.ids.shape if self.ids is not None else None
        if shape is None or len(shape) not in (2, 3):
            return None
        if len(shape) == 3:
            three = [axis for axis, dim in enumerate(shape) if dim == _MROPE]
            return three[0] if three and not isinstance(shape[0], int) else 0
        batches = [
            v.shape[0] if len(v.shape) == (3 if is_float(v) else 2) else 1
            for v in self.tokens
            if v.shape is not None
        ]
        return 0 if shape[0] == _MROPE and batches and _MROPE not in batches else None

    @property
    def takes_past(self) -> bool:
        """Whether a past of any length can be fed, or one of a fixed length in which slots are counted."""
        return any(self.is_past(value) for value in self._inputs)

    def is_past(self, value: ir.Value) -> bool:
        """Whether an input is a cache of keys or values, in few bits or not."""
        name, rank = name_of(value).lower(), _rank(value)
        if rank >= (3 if is_float(value) else 4) and _PAST.search(name):
            return True
        return rank >= 4 and "pixel" not in name and bool(_KEYS.search(name))

    def extent(self, dim: int | ir.SymbolicDim, call: Call) -> int | None:
        """The extent of a dimension in a call; None where its name is not one that the inputs explain."""
        if isinstance(dim, int):
            return dim if dim >= 0 else None  # -1 is how some exporters say that it varies
        if (dim.value or "").isdecimal() and len(
            dim.value or ""
        ) < 20:  # torch names some extents by their number
            return int(dim.value or 0)
        if dim.value in self._known:
            return self._known[dim.value]
        what = self._symbols.get(dim.value or "")
        return None if what is None else int(getattr(call, what))

    def feed(self, value: ir.Value, call: Call, ids: Array, seed: int = 0) -> Array:
        """What one input holds.

        Args:
            value: the input.
            call: extents.
            ids: int64 [B, S], the position ids.
            seed: of embeddings, past and token ids.

        Raises:
            CannotFeed: it is too large, of a type without numbers, or of a shape that contradicts those of the others.
        """
        try:
            return self._feed(value, call, ids, seed)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise CannotFeed(f"{name_of(value)} cannot be made up: {first_line(error)}") from error

    def _feed(self, value: ir.Value, call: Call, ids: Array, seed: int) -> Array:
        name, dtype = name_of(value).lower(), (value.dtype or ir.DataType.INT64).numpy()
        total = call.past + call.tokens
        if value is self.ids:
            return self._ids(value, call, ids).astype(dtype)
        if self.is_past(value):
            return self._past(value, call, seed).astype(dtype)
        if _MASK.search(name):
            shape = self._shape(value, call, last=total)
            return _mask(shape, call, dtype, additive=is_float(value) is not False)
        shape = self._shape(value, call)
        draw = np.random.default_rng([seed, sum(map(ord, name))])
        if is_float(value) is not False:
            return draw.normal(size=shape).astype(dtype)
        if name == "use_cache_branch":
            return np.full(shape, call.past > 0, dtype)
        if "position" in name:  # cache_position: which slots the new tokens take
            return np.broadcast_to(np.arange(call.past, total), shape).astype(dtype)
        if value in self.tokens:
            return draw.integers(1, SMALLEST_VOCABULARY, size=shape).astype(dtype)
        counted = next((count(call) for words, count in _COUNTS if words.search(name)), 0)
        return np.full(shape, counted, dtype)

    def _ids(self, value: ir.Value, call: Call, ids: Array) -> Array:
        shape, axis = self._shape(value, call), self.component_axis
        if axis is None:
            rank = _rank(value)
            return np.broadcast_to(ids if rank >= 2 else ids[0] if rank else ids[0, -1], shape)
        shape[axis] = self.components
        each = ids if ids.ndim == 3 else np.broadcast_to(ids, (self.components, *ids.shape))
        return np.broadcast_to(np.moveaxis(each if self.has_rows else each[:, 0], 0, axis), shape)

    def _past(self, value: ir.Value, call: Call, seed: int) -> Array:
        shape = self._shape(value, call)
        draw = np.random.default_rng([seed, sum(map(ord, name_of(value)))])
        content = draw.normal(size=shape)
        named = {self._symbols.get(d.value or "") for d in value.shape or () if isinstance(d, ir.SymbolicDim)}
        if "past" not in named:
            axis = 2 if len(shape) == 4 else len(shape) - 2  # a buffer of slots: the first are taken
            index = [slice(None)] * len(shape)
            index[axis] = slice(call.past, None)
            content[tuple(index)] = 0
        return np.asarray(content)

    def _shape(self, value: ir.Value, call: Call, last: int | None = None) -> list[int]:
        if value.shape is None:
            return [call.rows, call.tokens]
        extents = [self.extent(dim, call) for dim in value.shape]
        for (owner, axis), what in self._nameless.items():
            if owner is value:
                extents[axis] = int(getattr(call, what))
        if last is not None and extents and not isinstance(value.shape[-1], int):
            named = self._symbols.get(value.shape[-1].value or "")
            extents[-1] = call.tokens if named == "tokens" else last
        if extents and extents[0] is None:
            extents[0] = call.rows
        shape = [1 if extent is None else extent for extent in extents]
        check_fed(value, shape)
        return shape

    def _name(self, value: ir.Value, axis: int, what: str) -> None:
        if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
            return
        dim = value.shape[axis]
        if isinstance(dim, ir.SymbolicDim) and dim.value is None:
            self._nameless.setdefault((value, axis % len(value.shape)), what)
        elif isinstance(dim, ir.SymbolicDim) and dim.value is not None and not dim.value.isdigit():
            self._symbols.setdefault(dim.value, what)


def check_fed(value: ir.Value, shape: Sequence[int]) -> None:
    """Refuse to make up an input that would take too much memory.

    Raises:
        CannotFeed: it names the input.
    """
    if math.prod(shape) > MOST_FED:
        raise CannotFeed(f"{name_of(value)} has {math.prod(shape)} elements")


def _mask(shape: list[int], call: Call, dtype: Any, *, additive: bool) -> Array:
    """Ones where there is a token; of four axes, who sees whom: causal by slot."""
    keys = np.arange(shape[-1] if shape else 1)
    if len(shape) <= 2:
        return np.broadcast_to(keys < call.past + call.tokens, shape).astype(dtype)
    seen = keys <= call.past + np.arange(shape[-2])[:, None]
    content = np.where(seen, 0.0, _HIDDEN) if additive else seen
    return np.broadcast_to(content, shape).astype(dtype)


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)
