"""Run a decoder in ONNX Runtime with gapped and with renumbered ids, and see whether its logits follow.

The graph is run whole, as a user runs it; every input but the ids is made from its name, type and shape (`call`). Nothing is compared with
a reference model. What must hold is read off the graph's own answers:

    a gap moves what comes after it    ids [0, 1, 2, 6, 7, 8]: logits before the gap stay, those after it move, wherever the gap is
    gaps are taken                     ids that more tokens have are not refused where there are fewer
    ids are told apart                 logits of a token with id 300 are not those with id 44, nor 2049's those of 2050
    a gap hides nothing                a token that reached another token's logits without gaps reaches them with gaps
    a past is a distance away          where there is a past, all new ids further on move the logits
    each row has its own ids           a gap in one row of a batch moves that row's logits, and no other's
    gaps stand for what was dropped    where a mask can hide tokens, survivors with gapped ids have the logits of the whole sequence, the
                                       others hidden by the mask

The last one needs a mask input that really hides: that is seen from whether a hidden token still has any influence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.linter.call import Call
from gap_export.linter.dataflow import Flow
from gap_export.linter.report import Proof
from gap_export.linter.running import Feeding, NotRun, Running, open_session

Array = NDArray[Any]

_CALLS = (Call(1, 6, 0), Call(1, 6, 3), Call(1, 1, 3))
"""Tried in turn: a prompt, tokens after a past, a step."""
_GAP = 3
_NOTHING = 1e-6
"""Of the largest logit; smaller changes are none."""
_LEAK = 0.25
"""Of what a gap moves; tokens and rows that it must not touch may move by less, for kernels that round differently."""
_ALIKE = 0.05
"""Of what the gaps move; survivors that differ from the whole sequence by more are not its survivors."""
_HIGH_IDS = (44, 300, 1001, 1002, *range(2049, 2053), *range(4093, 4098))
"""300 and 44 are alike in eight bits, 2049 and 2050 in float16, 1001 and 1002 in bfloat16."""
_LARGEST_STATIC = 512
_DRAWS = 5
"""Contents with which a token must be seen otherwise before gaps are said to hide it."""


def prove(
    source: Path | str | ir.Model,
    flow: Flow,
    ids: ir.Value | None,
    *,
    tokens: Iterable[ir.Value] = (),
    fades: bool = False,
) -> Proof:
    """Measure whether the logits of a decoder follow its position ids.

    Args:
        source: the graph: a file, or a model in memory.
        flow: its data flow.
        ids: the position-ids input.
        tokens: inputs that carry the tokens.
        fades: whether attention falls with distance (ALiBi), so that ids far from all others are alike by right.

    Returns:
        What was measured, or why nothing was.
    """
    try:
        if ids is None:
            raise NotRun("there is no position-ids input that reaches the angles")
        with open_session(source, flow.model) as session:
            return _measure(Running(session, flow, ids, tokens), fades)
    except NotRun as reason:
        return Proof(outcome="not run here", sentence=str(reason))


def _measure(decoder: Running, fades: bool) -> Proof:
    checks = (_moves, _hides, *(() if fades else (_told_apart,)), _whole_sequence, _rows)
    largest, whole = 0.0, False
    for call, baseline in _calls(decoder):
        case = _Case(decoder, call, baseline)
        for check in checks:
            wrong = check(case)
            largest, whole = max(largest, case.largest), whole or case.whole
            if wrong:
                return Proof(
                    outcome="do not survive", sentence=wrong, moved=largest, whole=whole, runs=decoder.runs
                )
    like = ", and survivors have the logits of the whole sequence with the others hidden" if whole else ""
    sentence = f"gaps move the logits after them by {largest:.1e} of the largest, wherever they are, and hide no token{like}"
    return Proof(outcome="survive", sentence=sentence, moved=largest, whole=whole, runs=decoder.runs)


class _Case:
    """One call, and what it answers with contiguous ids.

    Args:
        decoder: that is run.
        call: extents.
        baseline: its logits with contiguous ids.

    Attributes:
        base: int64 [B, S], contiguous ids.
        least: smaller changes of a logit are none.
        largest: change of a logit by gaps so far, as a share of the largest logit.
        whole: whether survivors were compared with the whole sequence.
    """

    def __init__(self, decoder: Running, call: Call, baseline: Array) -> None:
        self.decoder, self.call, self.baseline = decoder, call, baseline
        self.base, self.largest, self.whole = _base(call), 0.0, False
        self.scale = float(np.abs(baseline).max()) or 1.0
        # A runtime need not repeat itself to the last bit.
        self.least = max(_NOTHING * self.scale, 4 * float(self.moved(self.base).max()))

    def run(
        self, ids: Array, disturbed: int | None = None, hidden: tuple[int, ...] = (), seed: int = 0
    ) -> Array:
        """Logits [B, S or 1, V]."""
        return self.decoder.logits(self.call, Feeding(ids, disturbed, hidden, seed=seed))

    def reached(self, token: int, ids: Array, seed: int) -> Array:
        """Which logits another content of a token changes."""
        by = np.abs(self.run(ids, token, seed=seed) - self.run(ids, seed=seed))
        return np.asarray(by.max(axis=(0, 2)) > self.least)

    def is_blind_to(self, gap: int) -> bool:
        """Whether no content shows a gap, though what stands before it reaches a token after it.

        A window of a few tokens lets nothing through; and where attention is sharp, one content may show nothing by chance.
        """
        after = slice(gap, None) if self.baseline.shape[1] == self.call.tokens else slice(None)
        gapped = self.base + _GAP * (np.arange(self.call.tokens) >= gap)
        for seed in range(1, _DRAWS):
            by = np.abs(self.run(gapped, seed=seed) - self.run(self.base, seed=seed)).max(axis=(0, 2))
            if (by[after] > self.least).any():
                return False
        return self.call.past > 0 or any(
            self.reached(token, self.base, seed)[after].any()
            for token in range(gap)
            for seed in range(_DRAWS)
        )

    def takes(self, tokens: int) -> bool:
        """Whether contiguous ids of more tokens are accepted."""
        longer = Call(self.call.rows, tokens, self.call.past)
        try:
            self.decoder.logits(longer, Feeding(_base(longer)))
        except NotRun:
            return False
        return True

    def moved(self, ids: Array) -> Array:
        """By how much other ids change the logits, for each token that has any."""
        return np.asarray(np.abs(self.run(ids) - self.baseline).max(axis=(0, 2)))


def _moves(case: _Case) -> str | None:
    """Whether a gap moves the logits after it and none before it."""
    call = case.call
    for gap in range(1 if call.past == 0 else 0, call.tokens):
        try:
            by = case.moved(case.base + _GAP * (np.arange(call.tokens) >= gap))
        except NotRun as refused:
            if not case.takes(call.tokens + _GAP):
                raise
            return f"a gap before token {gap} of {call.tokens} is refused, though more tokens have such ids ({refused})"
        every = len(by) == call.tokens
        after, before = (by[gap:], by[:gap]) if every else (by, by[:0])
        case.largest = max(case.largest, float(by.max()) / case.scale)
        if (after <= case.least).all() and case.is_blind_to(gap):
            return f"a gap before token {gap} of {call.tokens} moves no logits"
        if not case.decoder.rounds_together and (before > max(_LEAK * after.max(), case.least)).any():
            return f"a gap before token {gap} of {call.tokens} moves the logits of earlier tokens"
    return None


def _base(call: Call) -> Array:
    return np.arange(call.past, call.past + call.tokens)[None].repeat(call.rows, axis=0)


def _calls(decoder: Running) -> list[tuple[Call, Array]]:
    """A prompt and a call after a past, those of them that the runtime accepts, and their logits with contiguous ids."""
    tokens, rows = decoder.inputs.static("tokens"), decoder.inputs.static("rows")
    if (tokens or 0) > _LARGEST_STATIC:
        raise NotRun(f"it takes {tokens} tokens at a time")
    if (rows or 0) > _LARGEST_STATIC:
        raise NotRun(f"it takes {rows} rows at a time")
    refused: NotRun | None = None
    accepted: list[tuple[Call, Array]] = []
    for tried in _CALLS:
        call = Call(rows or 1, tokens or tried.tokens, tried.past)
        one_alone = call.tokens == 1 and call.past == 0
        had = any(each.past == call.past for each, _ in accepted)
        if one_alone or had or (call.past and not decoder.inputs.takes_past):
            continue
        try:
            accepted.append((call, decoder.logits(call, Feeding(_base(call)))))
        except NotRun as reason:
            refused = refused or reason
    if not accepted:
        raise refused or NotRun(
            "it takes one token and no past, so that there is no distance for a gap to change"
        )
    return accepted


def _told_apart(case: _Case) -> str | None:
    """Whether the last token has other logits for other ids, high ones too, as far up as tables go."""
    found: dict[int, Array] = {}
    for last in _HIGH_IDS:
        ids = case.base.copy()
        ids[:, -1] = last
        try:
            found[last] = case.run(ids)
        except NotRun:  # beyond the end of a table
            continue
    for a, b in itertools.combinations(found, 2):
        same = np.abs(found[a] - found[b]).max() <= case.least
        if same and a + 1 < case.decoder.longest_ids:
            return f"ids {a} and {b} give the same logits"
    return None


def _hides(case: _Case) -> str | None:
    """Whether gaps change which token reaches which logits."""
    tokens = case.call.tokens
    if case.decoder.rounds_together:
        return None
    gapped = case.base + _GAP * np.arange(tokens)
    for token in range(tokens):
        # Where attention is sharp, a token may by chance have no weight that counts; a mask hides it whatever tokens hold.
        if all(
            (case.reached(token, case.base, seed) != case.reached(token, gapped, seed)).any()
            for seed in range(_DRAWS)
        ):
            return f"with gaps other tokens see token {token} of {tokens} than without"
    return None


def _whole_sequence(case: _Case) -> str | None:
    """Whether survivors have the logits that they have in the whole sequence, the others hidden by the mask."""
    decoder, call = case.decoder, case.call
    fixed = decoder.inputs.static("tokens") is not None
    if decoder.mask is None or fixed or decoder.rounds_together or call.tokens < 6:
        return None
    kept, dropped = (0, 1, 3, 5), (2, 4)
    pruned = Call(call.rows, len(kept), call.past)
    ids = call.past + np.array([kept]).repeat(call.rows, axis=0)
    try:
        whole = case.run(case.base, hidden=dropped)
        disturbed = case.run(case.base, dropped[0], dropped)
        survivors = decoder.logits(pruned, Feeding(ids, kept=kept, longer=call))
        renumbered = decoder.logits(pruned, Feeding(_base(pruned), kept=kept, longer=call))
    except NotRun:
        return None
    rows = kept if whole.shape[1] == call.tokens else (-1,)
    whole, disturbed = whole[:, rows], disturbed[:, rows]
    if np.abs(whole - disturbed).max() > case.least or whole.shape != survivors.shape:
        return None  # the mask does not hide
    case.whole = True
    off, effect = float(np.abs(whole - survivors).max()), float(np.abs(renumbered - survivors).max())
    if off > _ALIKE * effect + case.least:
        return (
            f"survivors with their own ids differ from the same tokens of the whole sequence by {off / case.scale:.1e} of the "
            f"largest logit, where renumbering moves them by {effect / case.scale:.1e}"
        )
    return None


def _rows(case: _Case) -> str | None:
    """Whether each row of a batch is placed by its own ids."""
    decoder, call = case.decoder, case.call
    fixed = decoder.inputs.static("rows")
    if fixed == 1 or not decoder.inputs.has_rows:
        return None
    call = Call(fixed or 2, call.tokens, call.past)
    base = _base(call)
    try:
        baseline = decoder.logits(call, Feeding(base))
        for row in range(2):
            ids = base.copy()
            ids[row] += _GAP * np.arange(1, call.tokens + 1)
            by = np.abs(decoder.logits(call, Feeding(ids)) - baseline).max(axis=(1, 2))
            if by[row] <= _NOTHING * np.abs(baseline).max():
                return f"gaps in row {row} of a batch do not move its logits"
            if not decoder.rounds_together and np.delete(by, row).max() > _LEAK * by[row]:
                return f"gaps in row {row} of a batch move the logits of other rows"
    except NotRun:
        return None
    return None
