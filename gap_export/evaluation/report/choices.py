"""What every pruner would keep of the same image, and in which order: the scores behind a choice, made visible.

Pruners score in units of their own, and some have no score but an order (those that choose one token after the other). So what is
compared is the place of each token in that order: brightest is what a pruner would keep if it could keep one token only.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export import families, prune
from gap_export.boxes.draw import patch_edges
from gap_export.bundle.folder import Bundle
from gap_export.errors import GapExportError
from gap_export.evaluation.report.cases import token_grid
from gap_export.inputs.prompt import encode_text
from gap_export.inputs.tokenizer import load_tokenizer
from gap_export.pipeline.opened import TOKENIZER, open_model
from gap_export.positions import Ids
from gap_export.runtime.keep import keep_counts
from gap_export.runtime.torch.reference import open_model_of
from gap_export.runtime.torch.session import TorchSession
from gap_export.runtime.torch.text_reference import EmbeddingReference, TextReader, TextReference

_SLATE = (72, 77, 86, 190)
_OPACITY = 185


@dataclass(frozen=True)
class Map:
    """One pruner on one image.

    Attributes:
        x: where the tokens' grid begins on the image, pixels; outside it, where the image was padded.
        y: where it begins, downwards.
        width: of the grid, pixels of the image.
        height: of the grid, pixels of the image.
        uri: of an image with one pixel per token, to be laid over the other.
    """

    x: float
    y: float
    width: float
    height: float
    uri: str


@dataclass(frozen=True)
class Choices:
    """One pruner on all images.

    Attributes:
        name: of the pruner.
        summary: what it goes by.
        maps: one per image; none where the pruner cannot be asked.
        refused: why not.
    """

    name: str
    summary: str
    maps: tuple[Map, ...]
    refused: str = ""


def pruner_choices(
    bundle: Bundle, images: Sequence[Image.Image], expressions: Sequence[str]
) -> list[Choices]:
    """Ask every pruner.

    Args:
        bundle: whose checkpoint and whose share of tokens are taken; its own pruner is one among the others.
        images: RGB.
        expressions: one per image, for pruners that look at it.

    Raises:
        GapExportError: the checkpoint is not there any more.
    """
    model = open_model_of(bundle)
    text, text_ids, refused = _text(bundle, expressions)
    session = TorchSession(model, bundle.manifest.pruning, text_tower=text)
    found = []
    for row in prune.PRUNERS.values():
        pruner = row.on_tower(bundle.manifest.spec.missing_features)
        if pruner.name == "none":
            continue
        try:
            if pruner.in_decoder:
                raise _Refusal("chooses between the decoder's layers, for every prompt anew")
            if pruner.needs_text and text is None:
                raise _Refusal(refused)
            prune.check_tower(pruner, bundle.manifest.spec.missing_features)
            maps = tuple(
                _map(
                    session,
                    bundle,
                    pruner,
                    image,
                    text_ids[[row]] if text_ids is not None and pruner.needs_text else None,
                )
                for row, image in enumerate(images)
            )
            found.append(Choices(pruner.name, pruner.summary, maps))
        except _Refusal as why:
            found.append(Choices(pruner.name, pruner.summary, (), str(why)))
        except GapExportError as error:
            found.append(Choices(pruner.name, pruner.summary, (), error.message))
    return found


class _Refusal(Exception):
    """Why a pruner is not on the page."""


def _text(bundle: Bundle, expressions: Sequence[str]) -> tuple[TextReader | None, Ids | None, str]:
    """What reads the expressions, their ids for it, or why there is none."""
    recipe = bundle.manifest.recipe
    by_embeddings = families.row(bundle.manifest.family).text_by == "embeddings"
    if not recipe.text_tower and not by_embeddings:
        return None, None, "looks at the expression, and the recipe names no text tower"
    try:
        # Ranges and texts are no part of the question, and the files need not be there any more.
        opened = open_model(recipe.model_copy(update={"ranges": None, "calibration": None}), reads_text=True)
        assert opened.text_tower is not None
        if by_embeddings:
            return EmbeddingReference(), encode_text(opened.tokenizer, opened.text_tower, expressions), ""
        folder = opened.checkpoint.companions["text_tower"].folder
        ids = encode_text(load_tokenizer(folder / TOKENIZER), opened.text_tower, expressions)
        return TextReference(folder, opened.text_tower), ids, ""
    except GapExportError as error:
        return None, None, error.message


def _map(
    session: TorchSession, bundle: Bundle, pruner: prune.Pruner, image: Image.Image, text_ids: Ids | None
) -> Map:
    manifest = bundle.manifest
    grid = token_grid(image.width, image.height, manifest)
    if grid is None:
        raise _Refusal("tokens of this model do not lie on one grid")
    batch = manifest.layout.prepare([image], visual_tokens=manifest.spec.visual_tokens)
    tokens = int(batch.prunable[0])
    count = keep_counts(manifest.pruning, manifest.spec, batch, None).most
    kept = max(pruner.min_tokens, min(tokens, manifest.pruning.kept if count is None else count))
    order = session.order_of(pruner.name, batch.calls[0], kept, grid=grid, text_ids_BL=text_ids)
    columns_x, rows_y = patch_edges(image.width, image.height, grid, manifest.layout)
    return Map(
        x=float(columns_x[0]),
        y=float(rows_y[0]),
        width=float(columns_x[-1] - columns_x[0]),
        height=float(rows_y[-1] - rows_y[0]),
        uri=_uri(_shades(order, grid)),
    )


def _shades(order_K: Ids, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """[rows, columns, 4]: kept tokens from dark to bright, best brightest; slate over what was not kept."""
    from matplotlib import colormaps

    rows, columns = grid
    shades = np.full((rows * columns, 4), _SLATE, np.uint8)
    places = np.linspace(1.0, 0.15, len(order_K))
    shades[order_K] = np.round(255 * np.array(colormaps["inferno"](places))).astype(np.uint8)
    shades[order_K, 3] = _OPACITY
    return shades.reshape(rows, columns, 4)


def _uri(shades: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(shades, "RGBA").save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
