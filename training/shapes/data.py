"""The training scenes as flat arrays on disk: images, labels per patch, questions as token ids.

Every scene is stored once and used in two views, as drawn and mirrored left to right; view 2i + 1 is the mirror
image of view 2i. Nothing here depends on the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from gap_export.boxes.scenes import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TRAIN_SEED,
    SceneObject,
    make_scene,
    sample_queries,
    shape_mask,
)
from training.shapes.vocabulary import COORDINATE_BINS, answer_ids, question_ids

PATCH = 8
GRID = IMAGE_SIZE // PATCH
MAX_OBJECTS = 6
QUESTION_LEN = (
    14  # the longest question, "where is the small red circle left of the blue square ? assistant :"
)
ANSWER_LEN = 9  # the answer without its end token, which is only ever predicted
MIN_COVERED = 8  # pixels of a patch (of 64) from which on it counts as the object's
NO_OBJECT = 255


@dataclass(frozen=True)
class Bank:
    """Arrays over scenes (S) or views (V = 2 S), memory-mapped.

    pixels [S, 96, 96, 3] uint8; boxes [V, 6, 4] float32 pixels; kinds [V, 6, 3] uint8 (shape, colour, size);
    counts [V] uint8; owner [V, 144] uint8 (object index or 255); turns [V, Q, 23] uint8 token ids, left-padded;
    padding [V, Q] uint8; targets [V, Q] uint8; answers [V, Q, 10] uint8.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    kinds: NDArray[np.uint8]
    counts: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    turns: NDArray[np.uint8]
    padding: NDArray[np.uint8]
    targets: NDArray[np.uint8]
    answers: NDArray[np.uint8]

    @property
    def scenes(self) -> int:
        return len(self.pixels)

    @property
    def views(self) -> int:
        return len(self.boxes)

    def view_pixels(self, views: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images [n, 96, 96, 3] of the views, mirrored where the view is."""
        images = self.pixels[views // 2]
        mirrored = views % 2 == 1
        images[mirrored] = images[mirrored][:, :, ::-1]
        return images


def mirrored(item: SceneObject) -> SceneObject:
    """The object as it stands in the mirror image; every shape is its own mirror image."""
    left, top, right, bottom = item.box
    return replace(item, box=(IMAGE_SIZE - right, top, IMAGE_SIZE - left, bottom))


def owner_map(objects: tuple[SceneObject, ...]) -> NDArray[np.uint8]:
    """Which object covers most of each patch, 255 for none: [144]."""
    covered = np.zeros((len(objects), GRID * GRID), dtype=np.int64)
    for index, item in enumerate(objects):
        left, top, right, bottom = item.box
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.int64)
        canvas[top:bottom, left:right] = shape_mask(item.shape, right - left, bottom - top)
        covered[index] = canvas.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)
    owner = np.where(covered.max(0) >= MIN_COVERED, covered.argmax(0), NO_OBJECT).astype(np.uint8)
    for index in range(len(objects)):
        if not (owner == index).any():
            owner[covered[index].argmax()] = index
    return owner


def coordinate_bins(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """The box in hundredths of the image's side."""
    x0, y0, x1, y1 = (min(COORDINATE_BINS - 1, round(value / IMAGE_SIZE * COORDINATE_BINS)) for value in box)
    return x0, y0, x1, y1


def turn_ids(expression: str, box: tuple[float, float, float, float]) -> tuple[list[int], int, list[int]]:
    """Question and answer as one left-padded row, its padding, and the 10 answer targets."""
    question, answer = question_ids(expression), answer_ids(coordinate_bins(box))
    padding = QUESTION_LEN - len(question)
    return [0] * padding + question + answer[:-1], padding, answer


def build_bank(folder: Path, scenes: int, queries_per_view: int, seed: int = TRAIN_SEED) -> None:
    """Draw `scenes` scenes and write the arrays; does nothing where a complete bank is already there."""
    done = folder / "complete"
    stamp = f"{scenes} {queries_per_view} {seed}"
    if done.exists() and done.read_text() == stamp:
        return
    folder.mkdir(parents=True, exist_ok=True)
    views, shape = 2 * scenes, {}
    shape["pixels"] = np.zeros((scenes, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    shape["boxes"] = np.zeros((views, MAX_OBJECTS, 4), np.float32)
    shape["kinds"] = np.zeros((views, MAX_OBJECTS, 3), np.uint8)
    shape["counts"] = np.zeros(views, np.uint8)
    shape["owner"] = np.zeros((views, GRID * GRID), np.uint8)
    shape["turns"] = np.zeros((views, queries_per_view, QUESTION_LEN + ANSWER_LEN), np.uint8)
    shape["padding"] = np.zeros((views, queries_per_view), np.uint8)
    shape["targets"] = np.zeros((views, queries_per_view), np.uint8)
    shape["answers"] = np.zeros((views, queries_per_view, ANSWER_LEN + 1), np.uint8)
    for index in track(range(scenes), description="scenes"):
        scene = make_scene(seed, index)
        shape["pixels"][index] = scene.pixels
        for side, objects in enumerate((scene.objects, tuple(mirrored(item) for item in scene.objects))):
            view = 2 * index + side
            shape["counts"][view] = len(objects)
            shape["owner"][view] = owner_map(objects)
            for slot, item in enumerate(objects):
                shape["boxes"][view, slot] = item.box
                shape["kinds"][view, slot] = (
                    SHAPES.index(item.shape),
                    COLOURS.index(item.colour),
                    SIZES.index(item.size),
                )
            rng = np.random.default_rng((seed, index, 2 + side))
            for number, query in enumerate(sample_queries(rng, objects, queries_per_view)):
                row, padding, answer = turn_ids(query.expression, objects[query.target].box)
                shape["turns"][view, number] = row
                shape["padding"][view, number] = padding
                shape["targets"][view, number] = query.target
                shape["answers"][view, number] = answer
    for name, array in shape.items():
        np.save(folder / f"{name}.npy", array)
    done.write_text(stamp)


def load_bank(folder: Path) -> Bank:
    """The bank in memory; pixels stay memory-mapped."""
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "pixels" else None)
        for name in Bank.__annotations__
    }
    return Bank(**arrays)
