"""The synthetic scenes: same seed, same scene; expressions fit one object only; boxes hold what was drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gap_export.boxes.scenes import (
    COLOURS,
    DEV_SEED,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TRAIN_SEED,
    Scene,
    SceneObject,
    cases,
    make_scene,
    queries,
    sample_queries,
    shape_mask,
)

_SEED = 99  # of no split
_GRAMMAR = re.compile(
    rf"the (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)})"
    r"(?: (?P<place>on the left|on the right|at the top|at the bottom)"
    rf"| (?P<relation>left of|right of|above|below) the (?P<anchor>(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})))?"
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(_SEED, index) for index in range(150)]


def meant(expression: str, objects: tuple[SceneObject, ...]) -> list[int]:
    """Objects that an expression can mean, read the way a person would: plain comparisons of centres, no margins."""
    match = _GRAMMAR.fullmatch(expression)
    assert match is not None, f"not an expression of the grammar: {expression}"
    named = [
        index
        for index, item in enumerate(objects)
        if item.shape == match["shape"]
        and match["colour"] in (None, item.colour)
        and match["size"] in (None, item.size)
    ]
    centre = [item.centre for item in objects]
    if match["place"]:
        axis, pick = {
            "on the left": (0, min),
            "on the right": (0, max),
            "at the top": (1, min),
            "at the bottom": (1, max),
        }[match["place"]]
        best = pick(centre[index][axis] for index in named)
        return [index for index in named if centre[index][axis] == best]
    if match["relation"]:
        colour, shape = match["anchor"].split()
        anchors = [
            index for index, item in enumerate(objects) if item.colour == colour and item.shape == shape
        ]
        assert len(anchors) == 1, f"the anchor of '{expression}' is not unique"
        x, y = centre[anchors[0]]
        return [
            index
            for index in named
            if {
                "left of": centre[index][0] < x,
                "right of": centre[index][0] > x,
                "above": centre[index][1] < y,
                "below": centre[index][1] > y,
            }[match["relation"]]
        ]
    return named


def test_same_seed_same_case() -> None:
    first, second = list(cases(5, _SEED)), list(cases(5, _SEED))
    for left, right in zip(first, second, strict=True):
        assert (left.case_id, left.expression, left.box) == (right.case_id, right.expression, right.box)
        assert np.array_equal(np.asarray(left.image), np.asarray(right.image))


def test_a_longer_run_begins_with_the_shorter_one() -> None:
    assert [case.case_id for case in cases(3, _SEED)] == [case.case_id for case in cases(6, _SEED)][:3]


def test_splits_are_disjoint() -> None:
    assert len({HELD_OUT_SEED, DEV_SEED, TRAIN_SEED}) == 3
    images = [
        {make_scene(seed, index).pixels.tobytes() for index in range(40)}
        for seed in (HELD_OUT_SEED, DEV_SEED, TRAIN_SEED)
    ]
    assert not images[0] & images[1]
    assert not images[0] & images[2]
    assert not images[1] & images[2]


def test_case_is_a_square_rgb_image_with_its_box_inside() -> None:
    for case in cases(40, _SEED):
        assert case.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert case.image.mode == "RGB"
        left, top, right, bottom = case.box
        assert 0 <= left < right <= IMAGE_SIZE
        assert 0 <= top < bottom <= IMAGE_SIZE


def test_three_to_six_objects_that_do_not_touch(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 3 <= len(scene.objects) <= 6
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= IMAGE_SIZE
            assert 0 <= top < bottom <= IMAGE_SIZE
            canvas[top:bottom, left:right] += 1
        assert canvas.max() == 1


def test_every_query_means_its_target_and_nothing_else(scenes: list[Scene]) -> None:
    kinds = set()
    for scene in scenes:
        for query in queries(scene.objects):
            kinds.add(query.kind)
            assert meant(query.expression, scene.objects) == [query.target], query.expression
    assert kinds == {"attributes", "location", "relation"}


def test_the_check_itself_notices_an_ambiguous_expression(scenes: list[Scene]) -> None:
    twins = next(
        scene
        for scene in scenes
        if len({(item.shape, item.colour, item.size) for item in scene.objects}) < len(scene.objects)
    )
    keys = [(item.size, item.colour, item.shape) for item in twins.objects]
    twin = next(key for key in keys if keys.count(key) > 1)
    assert len(meant("the " + " ".join(twin), twins.objects)) > 1


def test_place_and_relation_are_used_only_where_attributes_do_not_decide(scenes: list[Scene]) -> None:
    for scene in scenes:
        for query in queries(scene.objects):
            if query.kind == "attributes":
                continue
            match = _GRAMMAR.fullmatch(query.expression)
            assert match is not None
            words = [match[name] for name in ("size", "colour", "shape") if match[name]]
            assert len(meant("the " + " ".join(words), scene.objects)) > 1


def test_box_holds_the_colour_that_it_should(scenes: list[Scene]) -> None:
    reference = {
        "red": (214, 40, 40),
        "green": (46, 160, 67),
        "blue": (44, 84, 214),
        "yellow": (235, 205, 50),
        "purple": (140, 60, 175),
        "orange": (240, 130, 35),
    }
    palette = np.array([reference[colour] for colour in COLOURS], dtype=float)
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    right = total = 0
    for scene in scenes:
        for item in scene.objects:
            left, top, right_edge, bottom = item.box
            region = scene.pixels[top:bottom, left:right_edge]
            mask = shape_mask(item.shape, right_edge - left, bottom - top)
            mean = region[mask].astype(float).mean(0)
            right += COLOURS[int((palette @ (mean / np.linalg.norm(mean))).argmax())] == item.colour
            total += 1
            if item.shape == "circle":  # the corners of its box are ground, not paint
                corner = region[~mask].astype(float).mean(0)
                assert np.abs(corner - mean).max() > 15
    assert right >= 0.99 * total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", [(13, 19), (26, 36)])
def test_a_shape_touches_all_sides_of_its_box_and_is_its_own_mirror_image(
    shape: str, sides: tuple[int, int]
) -> None:
    for width in range(sides[0], sides[1] + 1):
        for height in range(sides[0], sides[1] + 1):
            mask = shape_mask(shape, width, height)
            assert mask.shape == (height, width)
            assert mask[0].any()
            assert mask[-1].any()
            assert mask[:, 0].any()
            assert mask[:, -1].any()
            assert np.array_equal(mask, mask[:, ::-1])


def test_sampling_asks_each_question_once_before_it_repeats(scenes: list[Scene]) -> None:
    for index, scene in enumerate(scenes[:30]):
        possible = len(queries(scene.objects))
        drawn = sample_queries(np.random.default_rng(index), scene.objects, min(possible, 12))
        assert len({query.expression + str(query.target) for query in drawn}) == len(drawn)
        assert len(sample_queries(np.random.default_rng(index), scene.objects, possible + 3)) == possible + 3
