"""Procedural scenes with referring expressions: the test data of the bundled `llava-shapes` model.

A scene is a 96x96 image of 3 to 6 coloured shapes that do not overlap, on a textured, noisy ground. A query is an
expression that fits exactly one of them, by attributes ("the small red circle"), by place among look-alikes ("the red
circle on the left") or by relation to an object that is unique in colour and shape ("the circle left of the blue
square"). The answer is that object's box. Everything follows from (seed, index): the same pair gives the same scene
on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 96
SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
KINDS = ("attributes", "location", "relation")

# Seeds of the splits; a scene draws from (seed, index), so different seeds share no scene.
HELD_OUT_SEED = 730_041
DEV_SEED = 20_417
TRAIN_SEED = 1

_RGB = np.array(
    [(214, 40, 40), (46, 160, 67), (44, 84, 214), (235, 205, 50), (140, 60, 175), (240, 130, 35)],
    dtype=np.float32,
)
_EXTENT = {"small": (13, 19), "large": (26, 36)}  # pixels, inclusive
_ASPECT = (0.8, 1.25)
_CLEARANCE = 2  # pixels between two boxes, and between a box and the border
_REPEAT_PROBABILITY = 0.35  # an object takes colour and shape of an earlier one
_LEAD = 8.0  # pixels by which the meant object must win a comparison of centres

# Linear interpolation of a 7x7 texture to the image's pixels: the knot before each pixel, the share of the next.
_PLACE = np.linspace(0, 6, IMAGE_SIZE, dtype=np.float32)
_KNOT = np.minimum(_PLACE.astype(np.int64), 5)
_SHARE = (_PLACE - _KNOT).astype(np.float32)

_LOCATIONS = {"on the left": (0, -1), "on the right": (0, 1), "at the top": (1, -1), "at the bottom": (1, 1)}
_RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class SceneObject:
    """One shape. `box` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def fits(self, size: str | None, colour: str | None, shape: str) -> bool:
        """Whether the object has every attribute that is named."""
        return shape == self.shape and colour in (None, self.colour) and size in (None, self.size)


@dataclass(frozen=True)
class Query:
    """An expression that fits exactly one object of its scene."""

    expression: str
    target: int
    kind: str


@dataclass(frozen=True)
class Scene:
    """Pixels [96, 96, 3] uint8 and the objects that were drawn on them."""

    pixels: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Case:
    """One image, one expression, the box that it means: (x0, y0, x1, y1) in pixels of the image."""

    case_id: str
    image: Image.Image
    expression: str
    box: tuple[float, float, float, float]


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the split `seed`."""
    rng = np.random.default_rng((seed, index))
    objects = _place_objects(rng)
    return Scene(_paint(rng, objects), objects)


def objects_of(seed: int, index: int) -> tuple[SceneObject, ...]:
    """The objects of scene number `index` of the split `seed`, without an image of them."""
    return _place_objects(np.random.default_rng((seed, index)))


def queries(objects: tuple[SceneObject, ...]) -> list[Query]:
    """Every query that the scene allows, in a fixed order."""
    return list(_queries(objects))


def _queries(objects: tuple[SceneObject, ...]) -> Iterator[Query]:
    names = [(item.colour, item.shape) for item in objects]
    anchors = [index for index, name in enumerate(names) if names.count(name) == 1]
    for target, item in enumerate(objects):
        for size in (None, item.size):
            for colour in (None, item.colour):
                phrase = " ".join(word for word in ("the", size, colour, item.shape) if word)
                rivals = [
                    other
                    for index, other in enumerate(objects)
                    if index != target and other.fits(size, colour, item.shape)
                ]
                if not rivals:
                    yield Query(phrase, target, "attributes")
                    continue
                for words, (axis, sign) in _LOCATIONS.items():
                    if all(_leads(item, other, axis, sign) for other in rivals):
                        yield Query(f"{phrase} {words}", target, "location")
                for anchor in anchors:
                    if anchor == target or objects[anchor].fits(size, colour, item.shape):
                        continue
                    name = f"the {objects[anchor].colour} {objects[anchor].shape}"
                    for words, (axis, sign) in _RELATIONS.items():
                        if _leads(item, objects[anchor], axis, sign) and all(
                            _leads(objects[anchor], other, axis, sign) for other in rivals
                        ):
                            yield Query(f"{phrase} {words} {name}", target, "relation")


def sample_queries(
    rng: np.random.Generator, objects: tuple[SceneObject, ...], count: int, *, repeat: bool = True
) -> list[Query]:
    """`count` queries: the kind is drawn first (attributes 40 %, location 30 %, relation 30 %), then the object, then
    the wording. Without repetition as far as the scene allows; fewer, where they may not be repeated."""
    by_kind: dict[str, dict[int, list[Query]]] = {kind: {} for kind in KINDS}
    for query in queries(objects):
        by_kind[query.kind].setdefault(query.target, []).append(query)
    spent: dict[str, dict[int, list[Query]]] = {}
    chosen: list[Query] = []
    while len(chosen) < count:
        draws = rng.random(3)
        kind = KINDS[int(np.searchsorted((0.4, 0.7), draws[0], side="right"))]
        if not by_kind[kind]:
            kind = next((other for other in KINDS if by_kind[other]), "")
            if not kind and not repeat:
                break
            if not kind:
                by_kind, spent = spent, {}
                continue
        targets = sorted(by_kind[kind])
        target = targets[int(draws[1] * len(targets))]
        options = by_kind[kind][target]
        query = options.pop(int(draws[2] * len(options)))
        if not options:
            del by_kind[kind][target]
        spent.setdefault(query.kind, {}).setdefault(query.target, []).append(query)
        for other in KINDS:
            spent.setdefault(other, {})
        chosen.append(query)
    return chosen


def cases(count: int, seed: int = HELD_OUT_SEED) -> Iterator[Case]:
    """`count` scenes of the split `seed`, one query each."""
    for index in range(count):
        scene = make_scene(seed, index)
        query = sample_queries(np.random.default_rng((seed, index, 1)), scene.objects, 1)[0]
        left, top, right, bottom = scene.objects[query.target].box
        yield Case(
            case_id=f"shapes-{seed}-{index:05d}",
            image=Image.fromarray(scene.pixels),
            expression=query.expression,
            box=(float(left), float(top), float(right), float(bottom)),
        )


def _leads(first: SceneObject, second: SceneObject, axis: int, sign: int) -> bool:
    """Whether `first` lies clearly further in the direction `sign` along `axis` (0: x, 1: y) than `second`."""
    return sign * (first.centre[axis] - second.centre[axis]) >= _LEAD


def _place_objects(rng: np.random.Generator) -> tuple[SceneObject, ...]:
    """Three to six objects whose boxes keep clear of each other; starts over in the rare case that they do not fit."""
    while True:
        count = int(rng.integers(3, 7))
        objects: list[SceneObject] = []
        for _ in range(count):
            if objects and rng.random() < _REPEAT_PROBABILITY:
                model = objects[int(rng.integers(len(objects)))]
                shape, colour = model.shape, model.colour
            else:
                shape, colour = (
                    SHAPES[int(rng.integers(len(SHAPES)))],
                    COLOURS[int(rng.integers(len(COLOURS)))],
                )
            size = SIZES[int(rng.integers(2))]
            box = _free_box(rng, size, [item.box for item in objects])
            if box is None:
                break
            objects.append(SceneObject(shape, colour, size, box))
        if len(objects) >= 3 and any(_queries(tuple(objects))):
            return tuple(objects)


def _free_box(
    rng: np.random.Generator, size: str, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A box of that size that touches no taken one, or None after 30 tries."""
    low, high = _EXTENT[size]
    for _ in range(30):
        draws = rng.random(4)
        side = low + draws[0] * (high - low)
        stretch = float(np.exp(np.log(_ASPECT[0]) + draws[1] * np.log(_ASPECT[1] / _ASPECT[0])))
        width = min(max(round(side * stretch**0.5), low), high)
        height = min(max(round(side / stretch**0.5), low), high)
        left = _CLEARANCE + int(draws[2] * (IMAGE_SIZE - 2 * _CLEARANCE - width + 1))
        top = _CLEARANCE + int(draws[3] * (IMAGE_SIZE - 2 * _CLEARANCE - height + 1))
        if all(
            left >= right_2 + _CLEARANCE
            or left_2 >= left + width + _CLEARANCE
            or top >= bottom_2 + _CLEARANCE
            or top_2 >= top + height + _CLEARANCE
            for left_2, top_2, right_2, bottom_2 in taken
        ):
            return left, top, left + width, top + height
    return None


def shape_mask(shape: str, width: int, height: int) -> NDArray[np.bool_]:
    """Which pixels of a width x height box the shape covers; it touches all four sides. Returns [height, width]."""
    # Twice the distance from the centre, in whole pixels: comparisons are exact, so shapes are exactly symmetric.
    x = np.abs(2 * np.arange(width) + 1 - width)
    y = (2 * np.arange(height) + 1 - height)[:, None]
    if shape == "circle":
        circle: NDArray[np.bool_] = (x * height) ** 2 + (y * width) ** 2 <= (width * height) ** 2
        return circle
    if shape == "square":
        return np.ones((height, width), dtype=np.bool_)
    if shape == "triangle":
        return (2 * height * x <= width * (y + height)) | np.broadcast_to(x <= 1, (height, width))
    side = min(width, height)
    diamond: NDArray[np.bool_] = (x * height + np.abs(y) * width) * side <= width * height * (side + 1)
    return diamond


def _paint(rng: np.random.Generator, objects: tuple[SceneObject, ...]) -> NDArray[np.uint8]:
    """Low-frequency texture, the shapes in slightly varied colours, fine noise over everything."""
    coarse = rng.uniform(-28, 28, (7, 7, 3)).astype(np.float32)
    ground = rng.uniform(85, 170, 3).astype(np.float32) * 0.35 + rng.uniform(85, 170) * 0.65
    image = _stretch(_stretch(coarse).swapaxes(0, 1)) + ground
    for item in objects:
        left, top, right, bottom = item.box
        tint = _RGB[COLOURS.index(item.colour)] * rng.uniform(0.88, 1.1) + rng.uniform(-10, 10, 3)
        region = image[top:bottom, left:right]
        region[shape_mask(item.shape, right - left, bottom - top)] = tint
    image += rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32) * 7
    return np.clip(image, 0, 255).astype(np.uint8)


def _stretch(knots: NDArray[np.float32]) -> NDArray[np.float32]:
    """Linear interpolation of the first axis, 7 knots, to the image's pixels."""
    share = _SHARE.reshape(-1, *([1] * (knots.ndim - 1)))
    stretched: NDArray[np.float32] = knots[_KNOT] * (1 - share) + knots[_KNOT + 1] * share
    return stretched
