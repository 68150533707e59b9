"""A receipt: what an answer was computed from, small enough to be kept with it, and exact enough to be computed again.

A receipt holds no image and, of a conversation, no text: digests of them. Whoever has the bundle and the image can tell whether the answer is the bundle's
(`check_receipt.py`): that the tokens kept are those, and that every position id is the one that follows from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from gap_export import __version__
from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError, shown
from gap_export.files import kinds, read_bytes
from gap_export.positions import Ids, PositionPolicy
from gap_export.records import Count, Number, Record, Text
from gap_export.runtime.answer.sampling import Sampling
from gap_export.runtime.conversation.chat import AskOptions
from gap_export.serving.work import Conversation, Expression, FinishReason, Result, Work

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
MOST_IMAGES, LONGEST_TEXT = 1024, 1_000_000


class ImageDigest(Record):
    """An image as it was decoded.

    Attributes:
        size: (width, height) in pixels, as displayed.
        sha256: of its pixels, RGB, row by row.
    """

    size: tuple[Count, Count]
    sha256: Sha256


class Receipt(Record):
    """What an answer was computed from, and the answer.

    Attributes:
        schema_version: of this record.
        gap_export: version that answered.
        manifest_sha256: of the bundle's manifest, which has the hashes of all its files.
        graphs: name -> hash of the ONNX file.
        pruner: its name.
        positions: policy by which survivors are numbered.
        box_format: in which boxes were read.
        keep_asked: fraction of the visual tokens that the request asked for; None where it chose none.
        keep_used: that was kept; None without an image.
        kept: visual tokens that entered the decoder, of all images.
        visual_tokens: of all images, before pruning.
        images: in their order.
        kept_indices_sha256: of the raster indices of all images, see `digest_of`.
        position_ids_sha256: of the ids of the whole prompt, as they were fed.
        text_lengths: text tokens before, between and after the images.
        first_text_position: id of the first text token after the last image; None without an image or text after it.
        next_position: id of the first generated token.
        next_slot: cache slot of the first generated token.
        expression: that was asked; None of a conversation.
        conversation_sha256: digest of the conversation; None of an expression.
        sampling: how tokens were chosen.
        stop: texts that end the answer.
        max_new_tokens: longest answer, as asked; None for the bundle's own.
        token_ids: generated, the end token left out.
        answer: text of those.
        boxes: in it, (x1, y1, x2, y2) in pixels of the last image.
        finish_reason: `stop` or `length`.
        receipt_sha256: of all other fields; tells a receipt that was damaged, and nothing of who wrote it.
    """

    schema_version: Literal[1] = 1
    gap_export: Text
    manifest_sha256: Sha256
    graphs: dict[str, Sha256]
    pruner: Text
    positions: PositionPolicy
    box_format: Text
    keep_asked: Fraction | None
    keep_used: Fraction | None
    kept: Count
    visual_tokens: Count
    images: Annotated[tuple[ImageDigest, ...], Field(max_length=MOST_IMAGES)]
    kept_indices_sha256: Sha256
    position_ids_sha256: Sha256
    text_lengths: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MOST_IMAGES + 1)]
    first_text_position: Count | None
    next_position: Count
    next_slot: Count
    expression: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    conversation_sha256: Sha256 | None = None
    sampling: Sampling
    stop: tuple[str, ...]
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None
    token_ids: tuple[Count, ...]
    answer: Annotated[str, Field(max_length=LONGEST_TEXT)]
    boxes: tuple[tuple[Number, Number, Number, Number], ...]
    finish_reason: FinishReason
    receipt_sha256: str = ""

    @property
    def own_sha256(self) -> str:
        """What `receipt_sha256` must be."""
        content = self.model_dump(mode="json", exclude={"receipt_sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def options(self) -> AskOptions:
        """How the answer was made."""
        return AskOptions(self.sampling, self.stop, self.max_new_tokens)


def receipt_of(
    bundle: Bundle,
    work: Work,
    number: int,
    images: Sequence[ImageDigest],
    result: Result,
    keep_asked: float | None,
) -> Receipt:
    """The receipt of one answer.

    Args:
        bundle: that answered.
        work: the request.
        number: of the question in it.
        images: digests of the request's, as they were answered about: see `image_digest`.
        result: the answer, with its trace.
        keep_asked: fraction that the client asked for; None where the bundle or the server chose.

    Raises:
        ValueError: the answer was made without a trace.
    """
    trace, manifest, question = result.trace, bundle.manifest, work.questions[number]
    if trace is None:
        raise ValueError("a receipt is made of an answer with a trace")
    receipt = Receipt(
        gap_export=__version__,
        manifest_sha256=bundle.manifest_sha256,
        graphs=graph_hashes(bundle),
        pruner=manifest.pruning.pruner,
        positions=manifest.pruning.positions,
        box_format=manifest.box.codec,
        keep_asked=keep_asked,
        keep_used=result.keep,
        kept=result.kept,
        visual_tokens=result.visual_tokens,
        images=tuple(images),
        kept_indices_sha256=digest_of(trace.kept_indices),
        position_ids_sha256=digest_of([trace.position_ids]),
        text_lengths=trace.text_lengths,
        first_text_position=trace.first_text_position,
        next_position=trace.next_position,
        next_slot=trace.next_slot,
        expression=question.text if isinstance(question, Expression) else None,
        conversation_sha256=conversation_digest(question) if isinstance(question, Conversation) else None,
        sampling=work.options.sampling,
        stop=work.options.stop,
        max_new_tokens=work.options.max_new_tokens,
        token_ids=result.ids,
        answer=result.text,
        boxes=result.boxes,
        finish_reason=result.finish_reason,
    )
    return receipt.model_copy(update={"receipt_sha256": receipt.own_sha256})


def read_receipt(source: Receipt | Mapping[str, Any] | Path | str) -> Receipt:
    """A receipt, read and checked field by field.

    Args:
        source: the receipt itself, as an answer has it, or a JSON file of it.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(source, Receipt):
        return source
    if isinstance(source, Mapping):
        content, subject = json.dumps(source, default=str).encode(), "receipt"
    elif isinstance(source, str | Path):
        content, subject = read_bytes(Path(source), kinds.RECEIPT), str(source)
    else:
        raise InputError(
            f"is of type {type(source).__name__}: {shown(source)}",
            subject="receipt",
            hint=kinds.RECEIPT.hint,
        )
    return Receipt.parse(content, subject=subject, hint=kinds.RECEIPT.hint, strict=True)


def graph_hashes(bundle: Bundle) -> dict[str, str]:
    """Name -> SHA-256 of every graph, as the manifest lists it."""
    manifest = bundle.manifest
    return {name: manifest.files[graph.file].sha256 for name, graph in sorted(manifest.graphs.items())}


def image_digest(image: Image.Image) -> ImageDigest:
    """Size and digest of an image's pixels.

    Args:
        image: RGB.
    """
    return ImageDigest(size=image.size, sha256=hashlib.sha256(image.tobytes()).hexdigest())


def digest_of(arrays: Sequence[Ids]) -> str:
    """Digest of arrays of whole numbers: of the shape of each, and of its numbers as 64-bit little-endian integers.

    Args:
        arrays: of any shapes, int64.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()


def conversation_digest(conversation: Conversation) -> str:
    """Digest of a conversation: of its turns as JSON, [role, text, images] each.

    Args:
        conversation: as asked.
    """
    turns = [list(astuple(turn)) for turn in conversation.turns]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()
