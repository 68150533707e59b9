"""A receipt computed again: with the bundle and the image, on this machine, line by line.

Position ids are held against the arithmetic of `positions.py` for the tokens that were kept, and not only against the bundle's graphs: the receipt of a server that
renumbers is caught, whatever else in it agrees, and also where the bundle at hand renumbers in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gap_export import __version__
from gap_export.bundle.folder import Bundle, open_bundle
from gap_export.bundle.golden import MIN_IOU, overlap
from gap_export.errors import GapExportError, InputError, in_one_line, shown
from gap_export.inputs.batch import ImageBatch
from gap_export.inputs.images import ImageSource, load_image
from gap_export.inputs.prompt import decode_answer
from gap_export.positions import Ids, PositionPolicy
from gap_export.runtime.answer.text_stream import TextStream
from gap_export.runtime.grounder import Grounder
from gap_export.serving.messages import Messages, SentConversation, read_messages
from gap_export.serving.placing import placed
from gap_export.serving.receipts import (
    Receipt,
    conversation_digest,
    digest_of,
    graph_hashes,
    image_digest,
    read_receipt,
)
from gap_export.serving.recomputed import Recomputed
from gap_export.serving.work import Expression, Question, Result

Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...] | None
"""One image, several in their order, or none."""


@dataclass(frozen=True)
class Line:
    """One thing that a receipt says.

    Attributes:
        name: what it is about.
        agrees: whether it is so; None where that cannot be told here.
        said: what was found, in words.
        checked: whether it was looked at as far as a check can; not where something for that was not given.
    """

    name: str
    agrees: bool | None
    said: str
    checked: bool = True


@dataclass(frozen=True)
class ReceiptCheck:
    """What became of a receipt.

    Attributes:
        lines: everything that was looked at.
    """

    lines: tuple[Line, ...]

    @property
    def agrees(self) -> bool | None:
        """Whether everything was checked and nothing contradicts the receipt; None where nothing does, and a part could not be checked."""
        if self.contradicted:
            return False
        return None if self.unchecked else True

    @property
    def contradicted(self) -> tuple[str, ...]:
        """Names of the lines that do not agree."""
        return tuple(line.name for line in self.lines if line.agrees is False)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the lines that could not be checked: anything may stand there."""
        return tuple(line.name for line in self.lines if not line.checked)


def check_receipt(
    bundle: Bundle | Path | str,
    receipt: Receipt | Mapping[str, Any] | Path | str,
    image: Images = None,
    expression: str | None = None,
    *,
    messages: Messages | None = None,
    threads: int = 0,
) -> ReceiptCheck:
    """Compute what a receipt says, and compare.

    Args:
        bundle: that is said to have answered, or its folder; the hash of every file is verified.
        receipt: as an answer had it, or a JSON file of it.
        image: that was asked about; a list of several, in their order; None of an answer without one.
        expression: that was asked; by default the one in the receipt.
        messages: of a conversation, as they were sent: OpenAI's list, the whole body of the request, or a JSON file of either. A receipt does
            not hold them, and of its answer nothing can be checked without.
        threads: of ONNX Runtime; 0 lets it choose.

    Returns:
        What agrees and what does not, and what could not be checked.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        InputError: receipt, image or messages cannot be read, or an expression is given besides messages.
        MissingRequirementError: messages are given, and the serve extra is not installed.
    """
    if expression is not None and messages is not None:
        raise InputError(
            "are given both",
            subject="an expression and messages",
            hint="give the one that was asked",
        )
    said = read_receipt(receipt)
    asked = None if messages is None else read_messages(messages)
    opened = open_bundle(bundle, every_hash=True)
    images = [load_image(each) for each in _sources(image)]
    checked = _Check(opened, said, images)
    checked.identity()
    checked.pruning()
    checked.question(expression, asked)
    checked.answer()
    try:
        with closing(Recomputed(checked.bundle, said, images, threads)) as recomputed:
            checked.computed(recomputed, _question(said, expression, asked))
    except GapExportError as error:
        checked.add("computed again", agrees=False, said=in_one_line(f"{error.subject}: {error.message}"))
    return ReceiptCheck(tuple(checked.lines))


def _question(receipt: Receipt, expression: str | None, asked: SentConversation | None) -> Question | None:
    """What is to be answered again; None where it is neither given nor in the receipt."""
    if asked is not None:
        return asked.conversation
    text = receipt.expression if expression is None else expression
    return None if text is None else Expression(text)


def _sources(image: Images) -> list[ImageSource]:
    """What was given, as a list."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


class _Check:
    """Lines about a receipt, one subject after the other.

    Args:
        bundle: opened.
        receipt: read.
        images: given.

    Attributes:
        bundle: read in the receipt's box format, where it has that.
        lines: so far.
    """

    def __init__(self, bundle: Bundle, receipt: Receipt, images: Sequence[Image.Image]) -> None:
        self.bundle, self._receipt, self._images = bundle, receipt, images
        self.lines: list[Line] = []

    def add(self, name: str, *, agrees: bool | None, said: str) -> None:
        """A line."""
        self.lines.append(Line(name, agrees, said))

    def leave_open(self, name: str, said: str) -> None:
        """A line about what could not be checked."""
        self.lines.append(Line(name, None, said, checked=False))

    def same(self, name: str, said: object, found: object, *, unit: str = "") -> None:
        """A line about two values that must be the same; hashes are shortened."""
        agrees = said == found
        words = _short(found) + unit
        self.add(
            name,
            agrees=agrees,
            said=words if agrees else f"the receipt says {_short(said)}{unit}, and it is {words}",
        )

    def identity(self) -> None:
        """Who answered: the receipt itself, bundle, graphs."""
        receipt, manifest = self._receipt, self.bundle.manifest
        self.same("receipt", receipt.receipt_sha256, receipt.own_sha256)
        self.same("manifest", receipt.manifest_sha256, self.bundle.manifest_sha256)
        self.same("graphs", receipt.graphs, graph_hashes(self.bundle))
        self.same("pruner", receipt.pruner, manifest.pruning.pruner)
        self.same("positions", str(receipt.positions), str(manifest.pruning.positions))
        if receipt.positions is not PositionPolicy.GAP:
            self.add(
                "baseline",
                agrees=None,
                said=f"position ids are {receipt.positions} on purpose, not those of gap",
            )
        if receipt.gap_export != __version__:
            self.add(
                "version", agrees=None, said=f"answered by {receipt.gap_export}, checked by {__version__}"
            )
        try:
            self.bundle = self.bundle.written_as(receipt.box_format)
        except InputError as error:
            self.add("box format", agrees=False, said=f"{error.subject}: {error.message}")

    def pruning(self) -> None:
        """How much was kept, and of which images."""
        receipt = self._receipt
        pruning = self.bundle.manifest.pruning
        if receipt.keep_asked is not None:
            self.same("keep asked", receipt.keep_used, receipt.keep_asked)
        if receipt.keep_used is not None and pruning.keep_range is None:
            self.same("keep used", receipt.keep_used, pruning.keep)
        self.same("number of images", len(receipt.images), len(self._images))
        for number, (said, image) in enumerate(zip(receipt.images, self._images, strict=False), 1):
            name = "image" if len(self._images) == 1 else f"image {number}"
            self.same(f"{name}, size", said.size, image.size)
            self.same(f"{name}, pixels", said.sha256, image_digest(image).sha256)

    def question(self, expression: str | None, asked: SentConversation | None) -> None:
        """What was asked.

        Args:
            expression: where one is given.
            asked: the conversation, where its messages are given.
        """
        receipt = self._receipt
        if (receipt.expression is None) == (receipt.conversation_sha256 is None):
            self.add(
                "question",
                agrees=False,
                said="is an expression or a conversation, and the receipt says both or neither",
            )
        if expression is not None:
            self.same("expression", receipt.expression, expression)
        if asked is not None:
            self.same("conversation", receipt.conversation_sha256, conversation_digest(asked.conversation))
        elif receipt.conversation_sha256 is not None and expression is None:
            self.leave_open(
                "conversation", "is not in the receipt: give the messages that were sent (--messages)"
            )
        if asked is not None and asked.sent is not None:
            options = asked.sent.options
            self.same("sampling", receipt.sampling, options.sampling)
            self.same("stop texts", receipt.stop, options.stop)
            self.same("longest answer", receipt.max_new_tokens, options.max_new_tokens)
            self.same("keep of the request", receipt.keep_asked, asked.sent.keep)

    def answer(self) -> None:
        """The answer by itself: its text is that of its tokens, and its boxes those of its text."""
        receipt, manifest = self._receipt, self.bundle.manifest
        if not all(token < manifest.spec.vocabulary for token in receipt.token_ids):
            self.add(
                "tokens", agrees=False, said=f"are not all of the vocabulary of {manifest.spec.vocabulary}"
            )
            return
        grounder = Grounder(self.bundle)
        if receipt.expression is not None:
            text = decode_answer(grounder.tokenizer, receipt.token_ids)
        else:
            stream = TextStream(grounder.tokenizer, receipt.stop)
            for token in receipt.token_ids:
                stream.push(token)
            stream.finish()
            text = stream.text
        self.same("answer", receipt.answer, text)
        boxes = grounder.boxes_in(text, self._images[-1].size) if self._images else ()
        self.same("boxes", receipt.boxes, boxes)

    def computed(self, again: Recomputed, question: Question | None) -> None:
        """What was kept, where it stood, and what came of it, as far as it is known what was asked.

        Args:
            again: the bundle, loaded.
            question: that was asked; None where that is not known.

        Raises:
            GapExportError: the bundle gives no answer to it.
        """
        receipt, batches = self._receipt, again.batches()
        if question is not None:
            result = again.answer(question)
            assert result.trace is not None
            fault = result.trace.fault
            self.add(
                "ids of this bundle",
                agrees=fault is None,
                said=fault or "follow from the tokens that it keeps",
            )
            self.same("text lengths", receipt.text_lengths, result.trace.text_lengths)
            self._placement(batches, result.trace.kept_indices, result.trace.text_lengths)
            self._tokens(result)
            return
        if self.bundle.manifest.text_tower is not None and batches:
            self.leave_open("kept tokens", "depend on the conversation")
        elif self._lengths_fit():
            self._placement(batches, again.kept(batches), receipt.text_lengths)
        for name in ("text lengths", "sampling", "tokens", "finish reason"):
            self.leave_open(name, "could be anything: what was asked is not known")

    def _lengths_fit(self) -> bool:
        """Whether the text that the receipt tells of fits into the bundle's cache, around the images that were given."""
        lengths, capacity = self._receipt.text_lengths, self.bundle.manifest.capacity
        fit = len(lengths) == len(self._images) + 1 and sum(lengths) <= capacity
        if not fit:
            words = (
                f"{shown(lengths)} around {len(self._images)} images do not fit into a cache of {capacity}"
            )
            self.add("text lengths", agrees=False, said=words)
        return fit

    def _placement(
        self, batches: Sequence[ImageBatch], kept: Sequence[Ids], text_lengths: Sequence[int]
    ) -> None:
        """The tokens that were kept, and where they and the text stood."""
        receipt = self._receipt
        self.same("kept tokens", receipt.kept, sum(map(len, kept)))
        self.same(
            "visual tokens", receipt.visual_tokens, sum(int(batch.visual_tokens.sum()) for batch in batches)
        )
        self.same("kept indices", receipt.kept_indices_sha256, digest_of(kept))
        try:
            must = placed(self.bundle.manifest.pruning, batches, kept, text_lengths)
        except ValueError as error:
            self.add("position ids", agrees=False, said=str(error))
            return
        counted = np.broadcast_to(np.arange(must.next_slot, dtype=np.int64), must.position_ids.shape)
        right = digest_of([must.position_ids])
        if receipt.position_ids_sha256 == digest_of([counted]) != right:
            self.add("position ids", agrees=False, said="the receipt's are renumbered: they count the slots")
        else:
            self.same("position ids", receipt.position_ids_sha256, right)
        self.same("first text position", receipt.first_text_position, must.first_text_position)
        self.same("next position", receipt.next_position, must.next_position)
        self.same("next slot", receipt.next_slot, must.next_slot)

    def _tokens(self, result: Result) -> None:
        """The answer that was computed again."""
        receipt = self._receipt
        self.same("finish reason", receipt.finish_reason, result.finish_reason)
        rounded = self.bundle.manifest.precision != "fp32"
        if rounded and receipt.expression is None and receipt.token_ids != result.ids:
            words = f"differ, as {self.bundle.manifest.precision} may on another machine; of a free answer that cannot be told from a wrong one"
            self.leave_open("tokens", words)
        elif rounded and receipt.token_ids != result.ids and len(receipt.boxes) == len(result.boxes) > 0:
            shared = min(
                overlap(said, found) for said, found in zip(receipt.boxes, result.boxes, strict=True)
            )
            words = f"differ, as {self.bundle.manifest.precision} may; boxes overlap by {shared:.3f}"
            self.add("tokens", agrees=None if shared >= MIN_IOU else False, said=words)
        else:
            self.same("tokens", receipt.token_ids, result.ids)


def _short(value: object) -> str:
    """A value for a line: of hashes, the beginning."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, dict):
        return ", ".join(f"{shown(name)[1:-1]} {_short(each)}" for name, each in list(value.items())[:8])
    return shown(value)
