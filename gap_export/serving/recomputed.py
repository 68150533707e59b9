"""A bundle, loaded to compute again what a receipt is of."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError, InputError
from gap_export.inputs.batch import ImageBatch
from gap_export.positions import Ids
from gap_export.runtime.backends import open_session
from gap_export.runtime.conversation.cache import SeenImages
from gap_export.runtime.generate import encode
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.model import Model
from gap_export.serving.engine import Engine
from gap_export.serving.limits import EngineLimits
from gap_export.serving.receipts import Receipt
from gap_export.serving.work import Question, Result, Work

_SECONDS = 3600.0


class Recomputed:
    """The bundle of a receipt.

    Args:
        bundle: opened.
        receipt: read.
        images: that were asked about, RGB.
        threads: of ONNX Runtime; 0 lets it choose.
    """

    def __init__(self, bundle: Bundle, receipt: Receipt, images: Sequence[Image.Image], threads: int) -> None:
        self._receipt, self._images = receipt, images
        self._model = Model(bundle, open_session(bundle, "onnxruntime", threads=threads))
        self._keep = receipt.keep_used if bundle.manifest.pruning.keep_range is not None else None

    def close(self) -> None:
        """Give back all memory."""
        self._model.close()

    def batches(self) -> list[ImageBatch]:
        """The images as the vision graph takes them, as many at a time as the bundle's prompt has.

        Raises:
            InputError: they are not as many.
        """
        grounder = self._model.grounder
        step = grounder.images_per_prompt
        if len(self._images) % step:
            raise InputError(
                f"were given, and this bundle takes {step} at a time",
                subject=f"{len(self._images)} images",
                hint="give those that were asked about",
            )
        return [
            grounder.prepare(self._images[first : first + step])
            for first in range(0, len(self._images), step)
        ]

    def kept(self, batches: Sequence[ImageBatch]) -> list[Ids]:
        """What is kept of every image, where that depends on the image alone."""
        manifest, found = self._model.bundle.manifest, list[Ids]()
        with self._model.session.turn():
            for batch in batches:
                counts = keep_counts(manifest.pruning, manifest.spec, batch, self._keep)
                seen = SeenImages(batch, counts)
                seen.visual = encode(self._model.session, batch, keep_counts=counts)
                found += seen.kept_indices()
        return found

    def answer(self, question: Question) -> Result:
        """The answer to a question, made as the receipt says.

        Raises:
            GapExportError: there is none.
        """
        work = Work(
            questions=(question,),
            open_images=lambda: self._images,
            images=len(self._images),
            keep=self._keep,
            options=self._receipt.options,
            deadline=_SECONDS,
            trace=True,
        )
        engine = Engine(self._model, EngineLimits(rows=1, queue=1))
        try:
            (outcome,) = engine.submit(work).result()
        finally:
            engine.close()
        if isinstance(outcome, GapExportError):
            raise outcome
        return outcome
