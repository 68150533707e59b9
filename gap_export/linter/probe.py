"""Run the part of a graph between the position ids and the rotary angles, and see whether angle j follows id j.

Data flow alone cannot tell `ids` from `ids[:, :1] + arange(S)`: both depend on the input. But the part in question is tiny
(a few nodes, one vector of frequencies or one table), so it is evaluated, without any weight. Five properties are checked:

    local         changing one id changes the angles of that token and of no other
    positionless  permuting the ids permutes the angles: an angle depends on the id and not on where the token stands
    pastless      the same ids after a past give the same angles
    per row       each row of a batch has the angles of its own ids; where ids come in three rows, each of the three counts
    exact         ids up to 4100 give different angles (ids in bfloat16, or clamped ones, do not)

Where rows of a table are picked by counting and the table itself is computed from the ids, it is the rows that were picked that are
looked at (`rotary.Rows`). What cannot be evaluated is reported as undecided, not as wrong, and not as right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gap_export.linter.call import Call, Inputs
from gap_export.linter.dataflow import Flow, name_of
from gap_export.linter.part import Array, CannotEvaluate, Part
from gap_export.linter.rotary import AngleValue, Rows

_TOKENS = (7, 11, 13)
"""Sequence lengths to try: one that no other axis of the angles has tells the token axis apart."""
_LARGEST_STATIC = 1 << 14
_PAST = 3
_ROW_STEPS = (5, 500, 5000)
"""In half precision the cosine of a slow frequency stays 1 for hundreds of positions."""
_HIGHEST = (4100, 2050, 1025, 513, 257, 129, 65, 33)
"""How many ids are told apart: as many of these as the tables of the graph serve. 4100 is past what float16 counts (2048)."""
_SOME_IDS = (*range(32), 63, 64, *range(127, 131), *range(255, 259), *range(511, 515), *range(1022, 1027))
_SOME_IDS += (*range(2046, 2056), *range(3000, 3010), *range(4090, 4100))
"""Those that are told apart where a call holds one token."""
_MOST_BRANCHES = 3
_CUT = "ids at or beyond the number of tokens have no angle: the table is cut to the length of the sequence"
_ALIKE = 0.05
"""Share of the ids that may have another one's angles before ids are called rounded: cosines of few frequencies may meet by chance."""


@dataclass(frozen=True)
class Outcome:
    """What a probe found out.

    Attributes:
        follows: True or False where it was decided, None where the part could not be evaluated.
        sentence: what is wrong where `follows` is False, what was in the way where it is None.
    """

    follows: bool | None
    sentence: str = ""


FOLLOWS = Outcome(True)


def probe(flow: Flow, ids: ir.Value, angles: Sequence[AngleValue]) -> dict[AngleValue, Outcome]:
    """Whether each angle tensor follows the ids, token by token.

    Args:
        flow: the graph.
        ids: what carries the ids, [S], [B, S] or [R, B, S]: the graph input, or a choice from it.
        angles: tensors to examine, or rows that are picked from tables.
    """
    return {angle: _probe(flow, ids, angle) for angle in dict.fromkeys(angles)}


def _probe(flow: Flow, ids: ir.Value, angle: AngleValue) -> Outcome:
    if isinstance(angle, ir.Value) and flow.definitions(angle) == [ids]:
        return FOLLOWS
    try:
        natural = _Angles(flow, ids, angle, {})
    except CannotEvaluate as reason:
        return Outcome(None, str(reason))
    branches = natural.branches
    if not branches:
        return _examined(natural)
    if len(branches) > _MOST_BRANCHES:
        return Outcome(None, f"{len(branches)} conditions decide what it is made of")
    evaluated = False
    for taken in itertools.product((True, False), repeat=len(branches)):
        try:
            outcome = _examined(_Angles(flow, ids, angle, dict(zip(branches, taken, strict=True))))
        except CannotEvaluate as reason:
            outcome = Outcome(None, str(reason))
        if outcome.follows is False:
            return outcome
        evaluated |= outcome.follows is True
        by_values = any(flow.facts(node.inputs[0]).values for node in branches if node.inputs[0] is not None)
        if outcome.follows is None and by_values:
            return outcome
    # A branch that no call of these extents can take (a squeeze of an axis that is not 1) need not be looked at.
    return FOLLOWS if evaluated else _examined(natural)


class _Angles:
    """One angle tensor as a function of the ids.

    Args:
        flow: the graph.
        ids: what carries the position ids: the graph input, or a choice from it.
        angle: the tensor, or rows of one.
        choices: branches that are fixed.
    """

    def __init__(self, flow: Flow, ids: ir.Value, angle: AngleValue, choices: dict[ir.Node, bool]) -> None:
        self._rows = angle if isinstance(angle, Rows) else None
        wanted = angle.values if isinstance(angle, Rows) else (angle,)
        self._parts = {value: Part(flow, value, given=ids, choices=choices) for value in wanted}
        self.made_up = any(part.made_up for part in self._parts.values())
        self.branches = list(dict.fromkeys(n for part in self._parts.values() for n in part.branches))
        self.tables = {rows for part in self._parts.values() for rows in part.tables}
        self.ids, self._angle = ids, angle
        flow.work.take(len(flow.inputs))
        self.inputs = Inputs(flow.inputs, ids if ids in flow.inputs else None)
        self._chosen = ids not in flow.inputs
        # Of ids that the graph chooses, or that have no shape, a batch is assumed.
        unknown = ids.shape is None or (self._chosen and len(ids.shape) >= 2)
        self.has_rows = unknown or self.inputs.has_rows
        facts = [flow.facts(value) for value in wanted]
        self._by_ids_alone = not any(f.values & ~flow.bit(ids) for f in facts)

    def ends_with_the_sequence(self, tokens: int, longer: int, past: int) -> bool:
        """Whether ids that fewer tokens do not have angles for are fine where there are more tokens."""
        if not self._by_ids_alone or self.inputs.static("tokens") is not None:
            return False
        try:
            self.run(np.arange(longer)[None], past)
        except CannotEvaluate:
            return False
        return True

    def run(self, ids: Array, past: int = 0) -> Array:
        """The angles of ids [B, S] or [R, B, S] after a past, float64 where they are a float.

        Raises:
            CannotEvaluate: as `Part.evaluate`.
        """
        rows = self.inputs.static("rows")
        if rows is not None and ids.shape[-2] == 1:
            ids = ids.repeat(rows, axis=-2)
        call = Call(ids.shape[-2], ids.shape[-1], past)
        given = {name_of(self.ids): ids.astype(np.int64)} if self._chosen else {}
        found = {v: part.evaluate(self.inputs, call, ids, given) for v, part in self._parts.items()}
        result = self._rows.pick(found, call) if self._rows is not None else found[self._angle]  # type: ignore[index]
        if result is None:
            raise CannotEvaluate("rows beyond the end of a table are picked")
        if result.dtype.kind == "f" or result.dtype == ml_dtypes.bfloat16:
            return result.astype(np.float64)
        return result


def _examined(part: _Angles) -> Outcome:
    fixed = part.inputs.static("tokens")
    if fixed is not None and fixed > _LARGEST_STATIC:
        return Outcome(None, f"it takes {fixed} tokens at a time")
    if (part.inputs.static("rows") or 1) > _LARGEST_STATIC:
        return Outcome(None, f"it takes {part.inputs.static('rows')} rows at a time")
    reason = ""
    for tokens in _TOKENS if fixed is None else (fixed,):
        try:
            return _examine(part, tokens)
        except CannotEvaluate as error:
            reason = str(error)
    return Outcome(None, reason)


def _examine(part: _Angles, tokens: int) -> Outcome:
    base = np.arange(tokens)[None]
    # One token at a time is a step, which has a past; other graphs may be of steps too.
    takes_past, step = part.inputs.takes_past, part.inputs.static("tokens") == 1
    pasts = (0, _PAST) if takes_past and not step else (_PAST,) if takes_past else (0,)
    past, before = _first_evaluated(part, base, pasts)
    axes = [axis for axis, extent in enumerate(before.shape) if extent == tokens]
    if tokens == 1 or not axes:
        return _one_token(part, tokens, past)
    if len(axes) != 1:
        raise CannotEvaluate("its axis of tokens cannot be told apart")
    axis = axes[0] - before.ndim
    for j in (0, tokens // 2, tokens - 1):
        changed_id = base.copy()
        changed_id[0, j] = tokens + 5
        try:
            after = part.run(changed_id, past)
        except CannotEvaluate:
            if part.ends_with_the_sequence(tokens, tokens + 6, past):
                return Outcome(False, _CUT)
            raise
        rows = _rows_that_differ(before, after, axis)
        if j not in rows:
            return Outcome(False, f"changing the id of token {j} of {tokens} does not change its angle")
        if rows != {j}:
            sentence = f"changing the id of token {j} of {tokens} changes the angles of other tokens"
            return Outcome(False, sentence)
    gapped = base + np.cumsum(base % 3 == 2)
    order = np.roll(np.arange(tokens)[::-1], 2)
    moved = np.take(part.run(gapped, past), order, axis=axis)
    if _rows_that_differ(part.run(gapped[:, order], past), moved, axis):
        return Outcome(False, "the angle of a token depends on where it stands, not only on its id")
    wrong = _after_a_past(part, gapped, past) or _per_row(part, gapped, past)
    return wrong or _exactness(part, tokens, past, axis)


def _first_evaluated(part: _Angles, ids: Array, pasts: Sequence[int]) -> tuple[int, Array]:
    """The first of some pasts after which the angles can be evaluated, and the angles."""
    for past in pasts[:-1]:
        with suppress(CannotEvaluate):
            return past, part.run(ids, past)
    return pasts[-1], part.run(ids, pasts[-1])


def _one_token(part: _Angles, tokens: int, past: int) -> Outcome:
    """The angle of one token: the only one of a step, or the one whose logits are wanted."""
    base = np.arange(tokens)[None]
    before = part.run(base, past)
    read = []
    for j in range(tokens):
        changed = base.copy()
        changed[0, j] += tokens + 5
        if not _same(before, part.run(changed, past)):
            read.append(j)
    if not read:
        return Outcome(False, "changing the id of a token does not change its angle")
    if len(read) > 1:
        return Outcome(False, f"the angle of a token depends on the ids of {len(read)} tokens")
    wrong = _after_a_past(part, base, past) or _per_row(part, base, past)
    if wrong:
        return wrong
    angles: dict[int, Array] = {}
    for each in _SOME_IDS:
        try:
            angles[each] = part.run(np.full((1, tokens), each), past).reshape(-1)
        except CannotEvaluate:
            break
    if part.made_up or not angles:
        return FOLLOWS
    return _told_apart(part, np.array(list(angles)), np.stack(list(angles.values())))


def _after_a_past(part: _Angles, ids: Array, past: int) -> Outcome | None:
    if not part.inputs.takes_past:
        return None
    try:
        first, later = part.run(ids, past), part.run(ids, past + _PAST)
    except CannotEvaluate:  # a prompt and a step are graphs of their own
        return None
    if _same(first, later):
        return None
    return Outcome(False, "the same ids have other angles after a longer past")


def _per_row(part: _Angles, ids: Array, past: int) -> Outcome | None:
    several = part.inputs.components
    if several >= 3:
        base = np.stack([ids] * several)
        before = part.run(base, past)
        for component in range(several - 3, several):  # of four, the first is the place in the text
            if not any(_reads_row(part, base, before, component, step, past) for step in _ROW_STEPS):
                return Outcome(False, f"row {component} of the ids is not read")
    rows = part.inputs.static("rows") or 2
    if not part.has_rows or rows < 2:
        return None
    own = np.concatenate([ids + row for row in range(rows)])  # no token has the id that it has in another row
    try:
        together = part.run(own, past)
        looked_at = sorted({0, 1, rows - 1})
        alone = {row: part.run(own[[row]].repeat(rows, axis=0), past) for row in looked_at}
    except CannotEvaluate:
        return None
    if any(each.shape != together.shape for each in alone.values()):
        raise CannotEvaluate("its shape depends on the ids")
    batch: list[int | None] = [axis for axis, extent in enumerate(together.shape) if extent == rows]
    batch += [None] if together.size % rows == 0 else []  # rows one after the other
    if any(
        all(_same(_row(together, k, axis, rows), _row(each, k, axis, rows)) for k, each in alone.items())
        for axis in batch
    ):
        return None
    return Outcome(False, "a row of a batch does not get the angles of its own ids")


def _row(angles: Array, row: int, axis: int | None, rows: int) -> Array:
    """What one row of a batch has, along an axis or among rows one after the other."""
    return np.asarray(angles.reshape(rows, -1)[row] if axis is None else np.take(angles, row, axis))


def _reads_row(part: _Angles, base: Array, before: Array, component: int, step: int, past: int) -> bool:
    """Whether angles change when one id of one row is so much larger."""
    changed = base.copy()
    changed[component, 0, -1] += step
    try:
        return not _same(before, part.run(changed, past))
    except CannotEvaluate:  # beyond the end of a table
        return False


def _exactness(part: _Angles, tokens: int, past: int, axis: int) -> Outcome:
    """Whether ids that differ have angles that differ, as far up as tables go."""
    if part.made_up:
        return FOLLOWS
    fixed = part.inputs.static("tokens")
    for highest in _HIGHEST:
        # A graph that takes a fixed number of tokens is shown a window at a time: ids next to each other, and ids 256 apart.
        wide = highest if fixed is None else tokens
        starts = {0} if fixed is None else {0, 256, 1000, highest // 2, highest - tokens}
        windows = [start + np.arange(wide)[None] for start in starts if 0 <= start <= highest - wide]
        try:
            found = [np.moveaxis(part.run(ids, past), axis, 0).reshape(wide, -1) for ids in windows]
        except CannotEvaluate:
            continue
        if found:
            ids, places = np.unique(np.concatenate(windows, axis=None), return_index=True)
            return _told_apart(part, ids, np.concatenate(found)[places])
    return FOLLOWS


def _told_apart(part: _Angles, ids: Array, angles: Array) -> Outcome:
    _, first, counts = np.unique(np.nan_to_num(angles), axis=0, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[first] > 1)
    if len(shared) <= _ALIKE * len(angles):
        return FOLLOWS
    j, k = (int(ids[place]) for place in np.flatnonzero(first == first[shared[0]])[:2])
    clamped = len(set(first[shared].tolist())) == 1 and j + 1 in part.tables
    if clamped:  # at the end of a table, beyond which there are no angles to have
        return FOLLOWS
    return Outcome(False, f"ids {j} and {k} give the same angle: ids are rounded or clamped")


def _rows_that_differ(a: Array, b: Array, axis: int) -> set[int]:
    if a.shape != b.shape:
        raise CannotEvaluate("its shape depends on the ids")
    different = np.moveaxis(~_equal(a, b), axis, 0).reshape(a.shape[axis], -1).any(axis=1)
    return {int(j) for j in np.flatnonzero(different)}


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(_equal(a, b).all())


def _equal(a: Array, b: Array) -> Array:
    both_nan = (a != a) & (b != b)
    return np.asarray((a == b) | both_nan)
