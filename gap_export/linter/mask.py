"""Whether each token sees what the model's mask says: the part of the graph that makes the mask is evaluated and compared, slot by slot.

Data flow alone cannot tell `slot_k <= write_index + q` from `<`. The part is a few nodes over integers, and no weight is read. Only
decoders of this project are held to it: others make their masks of inputs that lint does not know.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.linter.dataflow import Flow, name_of
from gap_export.linter.decoder import Decoder
from gap_export.linter.limits import MOST_FED
from gap_export.linter.part import CannotEvaluate, Part
from gap_export.linter.report import Finding, Rule
from gap_export.positions import AttentionMask, Ids, visible

SEES = Rule(id="mask-is-as-declared", title="each token sees the slots that the model's attention mask says")
IMAGE_SLOTS, WRITE_INDEX = "image_slots", "write_index"
_TOKENS, _SLOTS = 6, 12


def declared_mask(flow: Flow) -> AttentionMask | None:
    """The mask that the inputs of a decoder stand for; None where they are not those of this project's bundles."""
    names = {value.name for value in flow.inputs}
    if not {WRITE_INDEX, "inputs_embeds", "past.0.key"} <= names:
        return None
    return "image_blocks" if IMAGE_SLOTS in names else "causal"


def check_mask(decoder: Decoder, mask: AttentionMask) -> list[Finding]:
    """Compare every mask of a decoder with what it should be.

    Args:
        decoder: one that serves prefill and decode, with the inputs of this project's bundles.
        mask: of the model.
    """
    masks = {value: site for site in decoder.sites for value in site.masks}
    for value, site in masks.items():
        wrong = _difference(decoder.flow, value, mask)
        if wrong is not None:
            return [
                Finding(
                    rule=SEES.id,
                    severity="error",
                    breaks_ids=False,
                    node=name_of(site.node),
                    sentence=f"the attention mask {name_of(value)} {wrong}",
                    hint=f"the model's mask is {mask}: slots are those of write_index and {IMAGE_SLOTS}, counted per row",
                )
            ]
    return []


def _difference(flow: Flow, value: ir.Value, mask: AttentionMask) -> str | None:
    """In words, where a mask is not what it should be; None where it is."""
    by_name = {name_of(each): each for each in flow.inputs}
    write_index, embeds = by_name.get(WRITE_INDEX), by_name.get("inputs_embeds")
    past = next((each for name, each in by_name.items() if name.startswith("past.")), None)
    if write_index is None or embeds is None or past is None:
        return f"cannot be checked: there is no {WRITE_INDEX}, no inputs_embeds or no past"
    extents = {
        **_named(write_index, 0, 2),
        **_named(embeds, 1, _TOKENS),
        **_named(past, 2, _SLOTS),
    }
    slots = _size(past, 2) or _SLOTS
    tokens = _size(embeds, 1) or _TOKENS
    rows, images = _size(write_index, 0) or 2, by_name.get(IMAGE_SLOTS)
    blocks_each = 1 if images is None else _size(images, 1) or 1
    if max(tokens * slots, blocks_each) > MOST_FED:
        return "is too large to be evaluated"
    try:
        part = Part(flow, value)
        for starts, blocks in _calls(blocks_each, tokens):
            first, image_slots = starts[:rows], blocks[:rows]
            last = np.array([tokens - 1, min(2, tokens - 1)])[:rows]
            given = {WRITE_INDEX: first, IMAGE_SLOTS: image_slots, "last_index": last}
            sees = _as_bool(part.run(given, extents))[:, 0]
            queries = np.arange(tokens)[None].repeat(rows, axis=0)
            if (
                sees.shape[1] == 1
            ):  # the last layer need not compute more than the row whose logits are wanted
                queries = last[:, None]
            wanted = visible(mask, first[:, None] + queries, slots, image_slots)
            wrong_BSC = np.broadcast_to(sees, wanted.shape) != wanted
            if wrong_BSC.any():
                row, query, key = np.argwhere(wrong_BSC)[0]
                verb, to = ("hides", "from") if wanted[row, query, key] else ("shows", "to")
                return f"{verb} slot {key} {to} the token in slot {first[row] + queries[row, query]}"
    except (CannotEvaluate, ValueError, IndexError):
        return "cannot be evaluated"
    return None


def _calls(images: int, tokens: int) -> list[tuple[Ids, Ids]]:
    """(write_index [2], image_slots [2, I, 2]) of a prompt, and of a call that continues in the middle of an image."""
    ends = np.linspace(1, max(tokens, 2 * images), 2 * images).astype(np.int64).reshape(images, 2)
    rows = np.stack([ends, np.maximum(ends - 1, 0)])
    return [(np.array([0, 0]), rows), (np.array([3, 1]), rows)]


def _as_bool(mask: NDArray[np.generic]) -> NDArray[np.bool_]:
    """A mask of numbers is added to the logits."""
    return np.asarray(mask if mask.dtype == np.bool_ else mask.astype(np.float64) > -1.0, np.bool_)


def _size(value: ir.Value, axis: int) -> int | None:
    dim = value.shape[axis] if value.shape is not None else None
    return dim if isinstance(dim, int) and dim > 0 else None


def _named(value: ir.Value, axis: int, extent: int) -> dict[str, int]:
    dim = value.shape[axis] if value.shape is not None else None
    return {dim.value: extent} if isinstance(dim, ir.SymbolicDim) and dim.value is not None else {}
