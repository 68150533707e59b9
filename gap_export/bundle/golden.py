"""The golden request of a bundle: what PyTorch answers with the right position ids, and with wrong ones.

Whoever serves the bundle asks it of the very session that is to serve: the answer must be the first one, and with wrong ids it must not be. A session
that renumbers, or reads other weights, gives itself away before it answers anyone.

    golden.json   the request and both answers, in fp32
    golden.png    its image; it stands in every place of the prompt that has one

Where the two boxes overlap by less than half, boxes decide. Where no scene tells them apart (weights that know nothing of it), the logits of the first token do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gap_export.boxes.codecs import Box
from gap_export.boxes.metrics import as_rows, iou
from gap_export.bundle.check.files import GOLDEN
from gap_export.bundle.manifest import Manifest
from gap_export.errors import BundleError, InputError, shown
from gap_export.files import kinds, read_bytes
from gap_export.inputs.images import image_size, load_image
from gap_export.positions import Placement, PositionPolicy
from gap_export.records import Count, Number, Record, Text

MIN_IOU, MAX_PERTURBED_IOU = 0.9, 0.5
"""Overlap with the stored box that an answer must reach; and that one with wrong ids must stay below."""
MOST_LOGITS = 64
TOLERANCE = 0.5
LONGEST_EXPRESSION, LONGEST_SIDE = 1000, 4096

WrongIds = Literal["renumbered", "reversed"]
Decision = Literal["boxes", "logits"]


class GoldenAnswer(Record):
    """What PyTorch answers.

    Attributes:
        token_ids: generated, the end token left out.
        box: the first one, (x1, y1, x2, y2) in pixels of the image; None where there is none.
    """

    token_ids: tuple[Count, ...]
    box: tuple[Number, Number, Number, Number] | None


class TellingLogit(Record):
    """A token whose logit tells right ids from wrong ones.

    Attributes:
        token: its id.
        right: its logit as the first token of the answer.
        wrong: its logit with wrong ids.
    """

    token: Count
    right: Number
    wrong: Number


class GoldenRequest(Record):
    """A request whose answer is known.

    Attributes:
        expression: what to find.
        image: name of its file in the bundle.
        size: (width, height) of that, in pixels.
        keep: fraction of the visual tokens that was kept.
        positions: policy that the answers are of; another than gap makes a baseline.
        wrong_ids: what the wrong ids are, see `WRONG_IDS`.
        decided_by: what tells right and wrong apart.
        right: the answer.
        wrong: the one with wrong ids.
        logits: of the first token, those that differ most; empty where boxes decide.
        tolerance: where logits decide, how far from the right ones an answer may be, as a share of the distance between right and wrong.
    """

    expression: Text
    image: Literal["golden.png"] = "golden.png"
    size: tuple[Count, Count]
    keep: Number
    positions: PositionPolicy
    wrong_ids: WrongIds
    decided_by: Decision
    right: GoldenAnswer
    wrong: GoldenAnswer
    logits: tuple[TellingLogit, ...] = ()
    tolerance: Annotated[float, Field(gt=0, lt=1, strict=True)] = TOLERANCE

    @property
    def is_baseline(self) -> bool:
        """Whether the ids that are right here are those of a baseline."""
        return self.positions is not PositionPolicy.GAP

    def distance(self, logits_V: NDArray[np.float32]) -> float:
        """How far logits are from the right ones, as a share of the distance between right and wrong: 0 is right.

        Args:
            logits_V: [V] of the first token.
        """
        tokens = [each.token for each in self.logits]
        right, wrong = (
            np.array([getattr(each, name) for each in self.logits]) for name in ("right", "wrong")
        )
        apart = np.linalg.norm(logits_V[tokens].astype(np.float64) - right)
        return float(apart / np.linalg.norm(wrong - right))


def telling_logits(right_V: NDArray[np.float32], wrong_V: NDArray[np.float32]) -> tuple[TellingLogit, ...]:
    """The tokens whose logits differ most.

    Args:
        right_V: [V] of the first token, with the right ids.
        wrong_V: [V] with wrong ones.

    Returns:
        At most `MOST_LOGITS`, in the order of their ids; none where nothing differs.
    """
    differences_V = np.abs(right_V - wrong_V)
    tokens = np.sort(np.argsort(-differences_V, kind="stable")[:MOST_LOGITS])
    return tuple(
        TellingLogit(
            token=int(token), right=round(float(right_V[token]), 5), wrong=round(float(wrong_V[token]), 5)
        )
        for token in tokens
        if differences_V[token] > 0
    )


def overlap(one: Box | None, other: Box | None) -> float:
    """IoU of two boxes; 0 where one of them is missing."""
    return float(iou(as_rows([one]), as_rows([other]))[0])


# ----------------------------------------------------------------------------------------------------------------------
# Wrong ids


def renumbered(placement: Placement) -> Placement:
    """What exporters do: ids count the slots."""
    tokens = placement.position_ids.shape[-1]
    ids_BS = placement.write_index[:, None] + np.arange(tokens, dtype=np.int64)
    return replace(
        placement,
        position_ids=np.array(np.broadcast_to(ids_BS, placement.position_ids.shape)),
        next_position=placement.next_slot,
    )


def in_reverse(placement: Placement) -> Placement:
    """The ids of a call from its last to its first: wrong also where nothing was pruned yet, and counting the slots is right."""
    return replace(placement, position_ids=placement.position_ids[..., ::-1].copy())


WRONG_IDS: Mapping[WrongIds, Callable[[Placement], Placement]] = MappingProxyType(
    {"renumbered": renumbered, "reversed": in_reverse}
)
"""Ways to make the ids of one prompt wrong. `reversed` stands in where ids count the slots anyway: baselines, and bundles whose decoder gets every
visual token."""


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_golden(folder: Path, manifest: Manifest) -> GoldenRequest | None:
    """The golden request of a bundle; None where it has none.

    Args:
        folder: of the bundle.
        manifest: of the bundle.

    Raises:
        BundleError: it cannot be read, or is none of this bundle.
    """
    if GOLDEN not in manifest.files:
        return None
    path = folder / GOLDEN
    content = read_bytes(path, kinds.GOLDEN)
    golden = GoldenRequest.parse(
        content, subject=str(path), hint=kinds.GOLDEN.hint, error=BundleError, strict=True
    )
    fault = next(_faults(golden, manifest), None)
    if fault is not None:
        raise BundleError(f"is no request of this bundle: {fault}", subject=str(path), hint=kinds.GOLDEN.hint)
    return golden


def golden_image(folder: Path, golden: GoldenRequest) -> Image.Image:
    """The image of a golden request, RGB.

    Args:
        folder: of the bundle.
        golden: read from it.

    Raises:
        BundleError: it cannot be read, or is of another size.
    """
    path = folder / golden.image
    content = read_bytes(path, kinds.GOLDEN_IMAGE)
    try:
        size = image_size(content, name=str(path))
        if size == golden.size:
            return load_image(content, name=str(path))
    except InputError as error:
        raise BundleError(error.message, subject=error.subject, hint=kinds.GOLDEN_IMAGE.hint) from error
    raise BundleError(
        f"is {size[0]}x{size[1]} pixels, and {GOLDEN} says {golden.size[0]}x{golden.size[1]}",
        subject=str(path),
        hint=kinds.GOLDEN_IMAGE.hint,
    )


def _faults(golden: GoldenRequest, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a golden request, phrases about one field each."""
    pruning = manifest.pruning
    if len(golden.expression) > LONGEST_EXPRESSION or not golden.expression.isprintable():
        yield f"expression is {shown(golden.expression)}, and is one line of at most {LONGEST_EXPRESSION} characters"
    if not all(1 <= side <= LONGEST_SIDE for side in golden.size):
        yield f"size is {shown(golden.size)}, and sides are from 1 to {LONGEST_SIDE}"
    if golden.positions != pruning.positions:
        yield f"positions are {golden.positions}, and the bundle numbers {pruning.positions}"
    least, most = pruning.keep_range or (pruning.keep, pruning.keep)
    if not least <= golden.keep <= most:
        yield f"keep is {golden.keep:g}, and the bundle keeps {least:g} to {most:g}"
    for name, answer in (("right", golden.right), ("wrong", golden.wrong)):
        yield from _answer_faults(name, answer, golden, manifest)
    if golden.decided_by == "boxes":
        if golden.logits:
            yield "logits are given, and boxes decide"
        shared = overlap(golden.right.box, golden.wrong.box)
        if golden.right.box is None or shared >= MAX_PERTURBED_IOU:
            yield f"right.box and wrong.box overlap by {shared:.3f}, and boxes decide"
    else:
        yield from _logit_faults(golden.logits, manifest.spec.vocabulary)


def _answer_faults(
    name: str, answer: GoldenAnswer, golden: GoldenRequest, manifest: Manifest
) -> Iterator[str]:
    if len(answer.token_ids) > manifest.max_new_tokens:
        yield f"{name}.token_ids are {len(answer.token_ids)}, and answers have at most {manifest.max_new_tokens}"
    if not all(token < manifest.spec.vocabulary for token in answer.token_ids):
        yield f"{name}.token_ids has {max(answer.token_ids)}, of a vocabulary of {manifest.spec.vocabulary}"
    if answer.box is not None:
        x1, y1, x2, y2 = answer.box
        width, height = golden.size
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            yield f"{name}.box is {shown(answer.box)}, of an image of {width}x{height} pixels"


def _logit_faults(logits: Sequence[TellingLogit], vocabulary: int) -> Iterator[str]:
    tokens = [each.token for each in logits]
    if not 1 <= len(tokens) <= MOST_LOGITS:
        yield f"logits are of {len(tokens)} tokens, and are of 1 to {MOST_LOGITS}"
    if any(one >= other for one, other in pairwise(tokens)) or any(token >= vocabulary for token in tokens):
        yield f"logits are of the tokens {shown(tokens)}, and are of ascending ones of {vocabulary}"
    if not all(abs(value) < 1e6 for each in logits for value in (each.right, each.wrong)):
        yield "logits are beyond a million"
    if all(each.right == each.wrong for each in logits):
        yield "logits are the same with right and with wrong ids"
