"""The golden request, made: PyTorch answers generated scenes with right and with wrong position ids, and one that tells them apart is stored.

    scenes -> answers with the bundle's own ids, and with wrong ones -> the first scene whose two boxes lie apart, or the one whose first logits do

A server asks it of the session that will serve, before it is ready (`serving/ready.py`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from gap_export.boxes.codecs import Box
from gap_export.boxes.metrics import HIT_IOU
from gap_export.boxes.scenes import Case, cases
from gap_export.bundle.check.files import GOLDEN, GOLDEN_IMAGE
from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.golden import (
    MAX_PERTURBED_IOU,
    WRONG_IDS,
    GoldenAnswer,
    GoldenRequest,
    TellingLogit,
    WrongIds,
    overlap,
    telling_logits,
)
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import Manifest
from gap_export.checkpoint import Checkpoint, open_checkpoint
from gap_export.checkpoint.hub import resolve
from gap_export.checkpoint.random_weights import random_checkpoint
from gap_export.environment import check_build_extra
from gap_export.errors import (
    BundleError,
    CheckpointError,
    GapExportError,
    InputError,
    MissingRequirementError,
    first_line,
)
from gap_export.files import FolderLock, readable_size, write_atomically
from gap_export.pipeline.preflight import available_memory
from gap_export.precision import precision
from gap_export.progress import SILENT, Progress
from gap_export.runtime.grounder import Grounded, Grounder

if TYPE_CHECKING:
    from gap_export.runtime.torch.session import TorchSession

SEED = 406_211
"""Of the scenes: no split draws from it."""
SCENES, WITHOUT_BOXES = 24, 6
"""Most scenes that are answered; and most where none has a box so far."""
_ENLARGED = 4
"""Scenes are so much larger for models that take images at their own size, to have tokens that can be pruned."""
_CANDIDATES = 4
"""Scenes whose boxes tell right from wrong, of which the clearest answer is taken, for weights that are rounded."""
_NEAR_TIE = 2e-3
"""A token whose logit leads by less might be another one in another runtime, in fp32 too."""
_KEPT_TIE = 1e-4
_REFERENCE_BYTES = 300 * 10**6
"""What a reference takes besides its weights."""


@dataclass(frozen=True)
class _Answered:
    """A scene, and what PyTorch says of it.

    Attributes:
        case: with its image.
        wrong_ids: how its ids were made wrong.
        right: the answer.
        wrong: with wrong ids.
        inside: with tokens renumbered inside the decoder, where it drops them; None elsewhere.
        margin: by how much the likeliest token led at least, over the answer; 0 where the choice of tokens was a tie.
    """

    case: Case
    wrong_ids: WrongIds
    right: Grounded
    wrong: Grounded
    inside: Grounded | None
    margin: float

    @property
    def box(self) -> Box | None:
        """Of the right answer."""
        return self.right.answers[0].box

    @property
    def others(self) -> list[Grounded]:
        """Answers that must not be taken for the right one."""
        return [self.wrong, *([] if self.inside is None else [self.inside])]

    @property
    def lie_apart(self) -> bool:
        """Whether boxes tell right ids from wrong ones."""
        return self.box is not None and all(
            overlap(self.box, other.answers[0].box) < MAX_PERTURBED_IOU for other in self.others
        )

    @property
    def hits(self) -> bool:
        """Whether the right box is that of the scene."""
        return overlap(self.box, self.case.box) >= HIT_IOU

    @property
    def gap(self) -> float:
        """How far the first logits of right and wrong lie apart."""
        right_V = self.right.generation.logits[0][0]
        return min(float(np.linalg.norm(right_V - other.generation.logits[0][0])) for other in self.others)

    @property
    def is_steady(self) -> bool:
        """Whether the right answer is none of rounding."""
        return self.margin >= _NEAR_TIE


# ----------------------------------------------------------------------------------------------------------------------
# Into a bundle


def golden_of_build(
    bundle: Bundle, checkpoint: Checkpoint, out: Path, progress: Progress = SILENT
) -> tuple[Manifest, str]:
    """The last step of a build: a golden request beside the graphs, where this machine can make one.

    Args:
        bundle: written, and not in its place yet.
        checkpoint: that it was built from, with its companions.
        out: where the bundle will lie, for the message.
        progress: told of the stage.

    Returns:
        The manifest, with the files that were written; and what happened, in a sentence.
    """
    try:
        _check_memory(checkpoint)
        golden, image = make_golden(bundle, checkpoint.folder, progress=progress)
    except (GapExportError, MemoryError) as error:
        reason = f"{error.subject}: {error.message}" if isinstance(error, GapExportError) else "out of memory"
        return bundle.manifest, without_golden(out, reason)
    return write_golden(bundle, golden, image), in_words(golden)


def add_golden(
    folder: Path | str,
    *,
    replace: bool = False,
    checkpoint: Path | None = None,
    text_tower: Path | None = None,
    progress: Progress = SILENT,
) -> Bundle:
    """Give a bundle that was built without one its golden request; its manifest is written anew, and nothing else of it.

    Args:
        folder: of the bundle.
        replace: make it anew where there is one.
        checkpoint: where the weights lie; by default where the bundle was built from.
        text_tower: where those of the text tower lie, if there is one.
        progress: told of the stages.

    Returns:
        The bundle, with its request.

    Raises:
        BundleError: there is no bundle, it is damaged, or it has a golden request already.
        CheckpointError: the weights are not there any more, or PyTorch cannot answer with them.
        MissingRequirementError: the machine has not the memory, or packages are missing.
    """
    check_build_extra("making a golden request")
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    if GOLDEN in manifest.files and not replace:
        assert bundle.golden is not None  # and it can be read
        raise BundleError(
            "has a golden request already", subject=str(bundle.folder), hint="make it anew with --replace"
        )
    opened = _checkpoint_of(manifest, checkpoint, progress)
    _check_memory(opened)
    golden, image = make_golden(bundle, opened.folder, text_tower=text_tower, progress=progress)
    with FolderLock(bundle.folder):
        if open_bundle(bundle.folder).manifest != manifest:
            raise BundleError(
                "was changed meanwhile", subject=str(bundle.folder), hint="run the command again"
            )
        # At no instant does the manifest list a file that is not there as it says.
        bare = manifest.model_copy(
            update={
                "files": {
                    name: record
                    for name, record in manifest.files.items()
                    if name not in (GOLDEN, GOLDEN_IMAGE)
                }
            }
        )
        if bare != manifest:
            write_manifest(bundle.folder, bare)
        return Bundle(bundle.folder, write_golden(Bundle(bundle.folder, bare), golden, image))


def write_golden(bundle: Bundle, golden: GoldenRequest, image: Image.Image) -> Manifest:
    """Write both files, and a manifest that lists them.

    Args:
        bundle: whose manifest lists none.
        golden: the request.
        image: of it.

    Returns:
        The manifest, as it was written.
    """
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomically(bundle.folder / GOLDEN_IMAGE, content.getvalue())
    golden.write(bundle.folder / GOLDEN)
    added = {name: record_of(bundle.folder / name) for name in (GOLDEN, GOLDEN_IMAGE)}
    files = dict(sorted({**bundle.manifest.files, **added}.items()))
    manifest = bundle.manifest.model_copy(update={"files": files})
    write_manifest(bundle.folder, manifest)
    return manifest


def in_words(golden: GoldenRequest) -> str:
    """What a golden request is decided by, in a sentence."""
    ids = "of a baseline" if golden.is_baseline else "right"
    if golden.decided_by == "boxes":
        shared = overlap(golden.right.box, golden.wrong.box)
        return f"golden request stored: ids that are {ids} and wrong ones give boxes that overlap by {shared:.2f}"
    return f"golden request stored: the first token's logits tell ids that are {ids} from wrong ones (boxes of no scene do)"


def without_golden(out: Path, reason: str) -> str:
    """That there is no golden request, and how one is made, in a sentence.

    Args:
        out: the bundle.
        reason: why there is none.
    """
    return f"no golden request, which gap-export serve needs ({reason}); add it with: gap-export golden {out}"


def _checkpoint_of(manifest: Manifest, given: Path | None, progress: Progress) -> Checkpoint:
    if given is not None:
        return open_checkpoint(given)
    if manifest.recipe.weights == "random":
        return open_checkpoint(random_checkpoint(manifest.recipe.checkpoint, progress))
    return open_checkpoint(resolve(manifest.checkpoint, progress), name=manifest.checkpoint)


def _check_memory(checkpoint: Checkpoint) -> None:
    """Refuse what would not fit: PyTorch holds every weight in fp32.

    Raises:
        MissingRequirementError: with what is needed and what there is.
    """
    elements = sum(int(np.prod(weight.shape, dtype=np.int64)) for weight in checkpoint.weights.values())
    needed, free = 4 * elements + _REFERENCE_BYTES, available_memory()
    if free is not None and needed > free:
        raise MissingRequirementError(
            f"of {readable_size(free)} is free, and PyTorch takes about {readable_size(needed)} to answer in fp32",
            subject="memory",
            hint="use a machine with more, or set GAP_EXPORT_ANY_MEMORY=1 to try anyway",
        )


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def make_golden(
    bundle: Bundle, checkpoint: Path, *, text_tower: Path | None = None, progress: Progress = SILENT
) -> tuple[GoldenRequest, Image.Image]:
    """Choose a scene, with PyTorch.

    Args:
        bundle: whose way of pruning, prompt and box format the request is in.
        checkpoint: folder of the weights.
        text_tower: folder of those of the text tower, if there is one; by default where the bundle was built from.
        progress: told of the stage.

    Returns:
        The request, and its image.

    Raises:
        CheckpointError: the reference cannot be loaded, or fails.
        InputError: no scene's expression fits into a prompt of this bundle, or nothing tells right ids from wrong ones.
    """
    from gap_export.runtime.torch.reference import open_torch

    progress.stage("making the golden request with PyTorch")
    try:
        with open_torch(bundle, checkpoint=checkpoint, text_tower=text_tower) as reference:
            found = _chosen(
                _answers(bundle, reference), several=precision(bundle.manifest.precision).quantizes
            )
    except GapExportError:
        raise
    except Exception as error:  # a family's model raises what it meets
        raise CheckpointError(
            f"could not be asked in PyTorch: {first_line(error)}",
            subject=str(checkpoint),
            hint="the golden request needs the checkpoint that the bundle was built from",
        ) from error
    return _request(found, bundle.manifest), found.case.image


def _answers(bundle: Bundle, reference: TorchSession) -> Iterator[_Answered]:
    """Scene after scene, answered; none whose expression is too long for the bundle's prompts."""
    grounder, shifted = Grounder(bundle), reference.shifted_inside()
    boxes = 0
    count = _CANDIDATES if bundle.manifest.recipe.weights == "random" else SCENES
    answered = 0
    for case in cases(SCENES, SEED):
        if answered == count or (answered == WITHOUT_BOXES and not boxes):
            return
        try:
            grounder.prompts([case.expression])
        except InputError:
            continue
        answer = _answered(_enlarged(case, bundle.manifest), grounder, reference, shifted)
        answered, boxes = answered + 1, boxes + (answer.box is not None)
        yield answer


def _answered(
    case: Case, grounder: Grounder, reference: TorchSession, shifted: TorchSession | None
) -> _Answered:
    images = [case.image] * grounder.images_per_prompt

    def ground(session: TorchSession, wrong_ids: WrongIds | None = None) -> Grounded:
        return grounder.ground(
            session,
            images,
            [case.expression],
            adjust=None if wrong_ids is None else lambda placement, _: WRONG_IDS[wrong_ids](placement),
            keep_logits=wrong_ids is None,
        )

    right = ground(reference)
    placement = right.generation.placement
    counted = WRONG_IDS["renumbered"](placement)
    changes = not np.array_equal(counted.position_ids, placement.position_ids)
    wrong_ids: WrongIds = "renumbered" if changes else "reversed"
    return _Answered(
        case,
        wrong_ids,
        right,
        ground(reference, wrong_ids),
        None if shifted is None else ground(shifted),
        _margin(right),
    )


def _margin(run: Grounded) -> float:
    """By how much the likeliest token led at least; 0 where the visual tokens that were kept are a matter of rounding."""
    generation = run.generation
    if generation.margins is not None and generation.margins[0] <= _KEPT_TIE:
        return 0.0
    if generation.scores is not None:
        kept = len(generation.kept_of_last[0])
        best = np.sort(generation.scores[0])[::-1]
        if kept < len(best) and best[kept - 1] - best[kept] <= _KEPT_TIE * abs(best[kept - 1]):
            return 0.0
    if not generation.finite:
        return 0.0
    leads = [np.partition(logits_BV[0], -2)[-2:] for logits_BV in generation.logits]
    return float(min(first - second for second, first in leads))


def _chosen(answers: Iterator[_Answered], *, several: bool) -> _Answered:
    """The scene to store: one whose boxes lie apart, the right one on the target before others; else one whose logits do.

    Args:
        answers: scene after scene.
        several: whether several scenes are looked at for the clearest one, as answers of rounded weights differ a little.

    Raises:
        InputError: there is none.
    """
    every: list[_Answered] = []
    found: list[_Answered] = []
    for answer in answers:
        every.append(answer)
        if answer.lie_apart and answer.hits and answer.is_steady:
            found.append(answer)
            if len(found) == (_CANDIDATES if several else 1):
                break
    if found:
        return max(found, key=lambda answer: answer.margin)
    apart = [answer for answer in every if answer.lie_apart and answer.is_steady]
    if apart:
        return apart[0]
    telling = [answer for answer in every if answer.right.generation.finite and answer.gap > 0]
    if not telling:
        raise InputError(
            "has an answer that right and wrong position ids change"
            if every
            else "fits into a prompt of this bundle",
            subject="none of the scenes",
            hint="see gap-export validate, whose negative controls say more",
        )
    return max(telling, key=lambda answer: (answer.is_steady, answer.gap))


def _request(found: _Answered, manifest: Manifest) -> GoldenRequest:
    by_boxes = found.lie_apart and found.is_steady
    logits: tuple[TellingLogit, ...] = ()
    if not by_boxes:
        logits = telling_logits(found.right.generation.logits[0][0], found.wrong.generation.logits[0][0])
    return GoldenRequest(
        expression=found.case.expression,
        size=found.case.image.size,
        keep=manifest.pruning.keep,
        positions=manifest.pruning.positions,
        wrong_ids=found.wrong_ids,
        decided_by="boxes" if by_boxes else "logits",
        right=_stored(found.right),
        wrong=_stored(found.wrong),
        logits=logits,
    )


def _stored(run: Grounded) -> GoldenAnswer:
    return GoldenAnswer(token_ids=tuple(run.generation.tokens[0]), box=run.answers[0].box)


def _enlarged(case: Case, manifest: Manifest) -> Case:
    """The scene as large as the model can make something of."""
    if manifest.spec.token_range is None:
        return case
    width, height = case.image.size
    image = case.image.resize((width * _ENLARGED, height * _ENLARGED), Image.Resampling.NEAREST)
    x1, y1, x2, y2 = (edge * _ENLARGED for edge in case.box)
    return Case(case.case_id, image, case.expression, (x1, y1, x2, y2))
