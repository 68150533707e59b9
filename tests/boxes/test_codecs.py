"""Boxes as text and boxes on images: round trips, and every way an answer can be broken."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.boxes.codecs import (
    CODECS,
    Box,
    Frame,
    Unparsable,
    box_codec,
    from_pixels,
    known,
    to_pixels,
)
from gap_export.errors import InputError
from gap_export.inputs.square import SquareLayout, fit

STEP = {
    "llava": 0.01,
    "shikra": 0.001,
    "minigpt_v2": 0.01,
    "internvl": 0.001,
    "qwen2_vl": 0.001,
    "qwen2_5_vl": 0.001,
    "qwen3_vl": 0.001,
    "box_start_pixels": 0.001,
    "list_pixels": 0.001,
    "bbox_pixels": 0.001,
    "bbox_1000": 0.001,
}
SEEN = (1000, 1000)
"""Size of the image, for codecs that write pixels; the others do not look at it."""
PIXELS = [name for name, codec in CODECS.items() if codec.pixels]
FRAMES: tuple[Frame, ...] = ("padded_square", "image")


@st.composite
def normalised_boxes(draw: st.DrawFn) -> Box:
    xs = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    ys = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return xs[0], ys[0], xs[1], ys[1]


class TestWriting:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("llava", "[0.12, 0.30, 0.55, 1.00]"),
            ("shikra", "[0.123,0.300,0.550,1.000]"),
            ("minigpt_v2", "{<12><30><55><100>}"),
            ("internvl", "<box>[[123, 300, 550, 1000]]</box>"),
            ("qwen2_vl", "<|box_start|>(123,300),(550,1000)<|box_end|>"),
            ("qwen2_5_vl", '{"bbox_2d": [79, 134, 352, 448]}'),
            ("qwen3_vl", '{"bbox_2d": [123, 300, 550, 1000]}'),
            ("box_start_pixels", "<|box_start|>(79,134),(352,448)<|box_end|>"),
            ("list_pixels", "[79, 134, 352, 448]"),
            ("bbox_pixels", '{"bbox": [79, 134, 352, 448]}'),
            ("bbox_1000", '{"bbox": [123, 300, 550, 1000]}'),
        ],
    )
    def test_form(self, name: str, text: str) -> None:
        assert CODECS[name].encode((0.123, 0.3, 0.55, 1.0), (640, 448)) == text

    @pytest.mark.parametrize("name", PIXELS)
    @given(box=normalised_boxes(), width=st.integers(1, 5000), height=st.integers(1, 5000))
    def test_pixels_as_seen_go_there_and_back(self, name: str, box: Box, width: int, height: int) -> None:
        codec, seen = CODECS[name], (width, height)
        back = codec.decode_one(codec.encode(box, seen), seen)
        assert not isinstance(back, Unparsable)
        across, down = 0.5 / width + 1e-9, 0.5 / height + 1e-9
        for difference, reach in zip(np.subtract(back, box), (across, down) * 2, strict=True):
            assert abs(difference) <= reach

    @pytest.mark.parametrize("name", PIXELS)
    def test_pixels_as_seen_need_the_size(self, name: str) -> None:
        with pytest.raises(ValueError, match="whose size is needed"):
            CODECS[name].encode((0.1, 0.2, 0.3, 0.4))
        with pytest.raises(ValueError, match="whose size is needed"):
            CODECS[name].decode("")

    @pytest.mark.parametrize("name", CODECS)
    @settings(deadline=None)
    @given(box=normalised_boxes())
    def test_round_trip_within_one_step(self, name: str, box: Box) -> None:
        # A box of less than a step in all is read as InternVL's authors read it: as fractions of the frame.
        assume(not CODECS[name].fractions or sum(round(value / STEP[name]) for value in box) >= 4)
        back = CODECS[name].decode_one(CODECS[name].encode(box, SEEN), SEEN)
        assert not isinstance(back, Unparsable)
        # MiniGPT-v2 truncates, so it is off by up to a whole step, the others by half.
        reach = STEP[name] * (1.0 if name == "minigpt_v2" else 0.5) + 1e-9
        assert max(abs(a - b) for a, b in zip(back, box, strict=True)) <= reach

    @pytest.mark.parametrize("name", CODECS)
    def test_what_was_read_is_written_again_unchanged(self, name: str) -> None:
        codec = CODECS[name]
        steps = round(1 / STEP[name])
        for step in range(steps + 1):
            text = codec.encode((0.0, 0.0, step / steps, 1.0), SEEN)
            box = codec.decode_one(text, SEEN)
            assert not isinstance(box, Unparsable)
            assert box[2] == pytest.approx(step / steps, abs=1e-12)
            assert codec.encode(box, SEEN) == text

    def test_minigpt_v2_truncates(self) -> None:
        assert CODECS["minigpt_v2"].encode((0.019, 0.29, 0.999, 1.0)) == "{<1><29><99><100>}"

    @pytest.mark.parametrize("name", CODECS)
    def test_negative_zero_has_no_sign(self, name: str) -> None:
        text = CODECS[name].encode((-0.0, 0.0, 1.0, 1.0), SEEN)
        assert "-" not in text

    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize(
        ("box", "message"),
        [
            ((math.nan, 0.0, 1.0, 1.0), "not finite"),
            ((0.0, 0.0, math.inf, 1.0), "not finite"),
            ((0.0, 0.0, 1.01, 1.0), "leaves its frame"),
            ((-0.01, 0.0, 1.0, 1.0), "leaves its frame"),
            ((0.6, 0.0, 0.5, 1.0), "inverted"),
            ((0.0, 0.6, 1.0, 0.5), "inverted"),
        ],
    )
    def test_unsound_boxes_are_not_written(self, name: str, box: Box, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CODECS[name].encode(box, SEEN)


class TestReading:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("llava", "[0.1, 0.2, 0.3, 0.4]"),
            ("llava", "It is at [0.10,0.20,  0.30 , 0.40 ]."),
            ("llava", "[[0.1, 0.2, 0.3, 0.4]]"),
            ("llava", "[0.1, 0.2, 0.3, 0.4] or [0.5, 0.5, 0.9, 0.9]"),
            ("llava", "[0.1, 0.2, 0.3, 0.4] [0.9, 0.9, 0.1, 0.1]"),
            ("shikra", "Answer: [0.100,0.200,0.300,0.400] ."),
            ("minigpt_v2", "<p>mug</p> {<10><20><30><40>}"),
            ("minigpt_v2", "{<10> <20><30><40>}"),
            ("internvl", "<ref>the mug</ref><box>[[100, 200, 300, 400]]</box>"),
            ("internvl", "<ref>the mug</ref><box>[[100,200,300,400]]"),
            ("internvl", "<ref>mugs</ref><box>[[100, 200, 300, 400], [1, 2, 3, 4]]</box>"),
            (
                "qwen2_vl",
                "<|object_ref_start|>mug<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
            ),
            ("qwen2_vl", "mug<|box_start|>(100, 200), (300, 400)"),
            ("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "a mug 2"}\n]\n```'),
            ("qwen2_5_vl", '{"bbox_2d": [100, 200, 300, 400]}, {"bbox_2d": [5, 4, 3, 2]}'),
            ("qwen3_vl", '{"label": "mug", "bbox_2d": [100,200,300,400]}'),
            ("qwen3_vl", '[{"bbox_2d": [100, 200, 300, 400], "la'),
            ("list_pixels", "[100, 200, 300, 400]"),
            ("list_pixels", "The mug is at [100.0,200, 300, 400], the other at [1, 2, 3, 4]."),
            ("list_pixels", "[[100, 200, 300, 400]]"),
            ("bbox_pixels", '```json\n[{"bbox": [100, 200, 300, 400], "label": "mug"}]\n```'),
            ("bbox_pixels", "{'bbox_2d': [100, 200, 300, 400]}"),
            ("bbox_1000", '{"label": "mug", "bbox": [100,200,300,400]}'),
            ("bbox_1000", '{"bbox_2d": [100, 200, 300, 400]}'),
        ],
    )
    def test_one_box(self, name: str, text: str) -> None:
        assert CODECS[name].decode_one(text, SEEN) == (0.1, 0.2, 0.3, 0.4)

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("llava", "[0.1, 0.2, 0.3, 1.01]", (0.1, 0.2, 0.3, 1.01)),
            ("llava", "[-0.01, 0.2, 0.3, 0.4]", (-0.01, 0.2, 0.3, 0.4)),
            ("llava", "[.1, .2, 3e-1, 4E-1]", (0.1, 0.2, 0.3, 0.4)),
            ("shikra", "[0.1,0.2,0.3,1.01]", (0.1, 0.2, 0.3, 1.01)),
            ("minigpt_v2", "{<10><20><101><40>}", (0.1, 0.2, 1.01, 0.4)),
            ("internvl", "<box>[[100, 200, 300, 1003]]</box>", (0.1, 0.2, 0.3, 1.003)),
            ("internvl", "<box>[[-2, 200, 300.0, 400.0]]</box>", (-0.002, 0.2, 0.3, 0.4)),
            ("internvl", "[[0.1, 0.2, 0.3, 0.4]]", (0.1, 0.2, 0.3, 0.4)),
            ("qwen2_vl", "(100,200),(300,1003)", (0.1, 0.2, 0.3, 1.003)),
            ("qwen3_vl", '{"bbox_2d": [100, 200, 300, 1003]}', (0.1, 0.2, 0.3, 1.003)),
            ("qwen3_vl", '{"bbox_2d": [-1, 200, 300, 400]}', (-0.001, 0.2, 0.3, 0.4)),
        ],
    )
    def test_a_box_may_leave_its_frame(self, name: str, text: str, expected: Box) -> None:
        assert CODECS[name].decode_one(text, SEEN) == pytest.approx(expected, abs=1e-12)

    def test_a_box_that_drifts_over_the_edge_is_cut_on_the_image(self) -> None:
        """The example of the issue in which the authors say so: 476 in an image of 364 by 448."""
        box = CODECS["qwen2_5_vl"].decode_one('{"bbox_2d": [19, 300, 154, 476]}', (364, 448))
        assert not isinstance(box, Unparsable)
        assert to_pixels(box, "image", 364, 448, clamp=True) == pytest.approx((19, 300, 154, 448))

    def test_all_boxes_in_order(self) -> None:
        expected = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
        assert CODECS["llava"].decode("[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]") == expected
        assert CODECS["shikra"].decode("[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]") == expected
        assert CODECS["minigpt_v2"].decode("{<10><20><30><40>}{<50><60><70><80>}") == expected

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("shikra", "[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]"),
            ("shikra", "[0.1,0.2,0.3,0.4] [0.5,0.6,0.7,0.8]"),
            ("minigpt_v2", "{<10><20><30><40>}<delim>{<50><60><70><80>}"),
        ],
    )
    def test_several_boxes_where_one_is_expected(self, name: str, text: str) -> None:
        result = CODECS[name].decode_one(text, SEEN)
        assert isinstance(result, Unparsable)
        assert "2 boxes" in result.reason

    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no",
            "[0.1, 0.2, 0.3",
            "[0.1, 0.2, 0.3]",
            "[0.1, 0.2, 0.3, 0.4, 0.5]",
            "[nan, 0.1, 0.2, 0.3]",
            "[, , , ]",
            "[0.1, 0.2 <pad>, 0.3, 0.4]",
            "{<1><2><3>}",
            "{<1><2><3><4><5>}",
            "{<1><2><3><-4>}",
            "{<1000><2><3><4>}",
            "0.1, 0.2, 0.3, 0.4",
        ],
    )
    def test_no_box(self, name: str, text: str) -> None:
        for result in (CODECS[name].decode(text, SEEN), CODECS[name].decode_one(text, SEEN)):
            assert isinstance(result, Unparsable)
            assert result.text == text
            assert "no box of the form" in result.reason

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("llava", "[0.5, 0.2, 0.3, 0.4]", "inverted"),
            ("llava", f"[{'9' * 400}, 0.2, 0.3, 0.4]", "not finite"),
            ("llava", "[0.5, 0.2, 0.3, 0.4] [0.1, 0.2, 0.3, 0.4]", "inverted"),
            ("shikra", "[0.1,0.9,0.3,0.4]", "inverted"),
            ("shikra", "[0.1,0.2,0.3,0.4;0.9,0.2,0.3,0.4]", "inverted"),
            ("minigpt_v2", "{<40><20><30><40>}", "inverted"),
            ("internvl", "<box>[[100, 900, 300, 400]]</box>", "inverted"),
            ("internvl", "<box>[[0.1, 0.9, 0.3, 0.4]]</box>", "inverted"),
            ("qwen2_vl", "(300,200),(100,400)", "inverted"),
            ("qwen2_vl", "(100,200),(300", "no box of the form"),
            ("qwen2_5_vl", '{"bbox_2d": [300, 200, 100, 400]}', "inverted"),
            ("qwen2_5_vl", '{"bbox_2d": [100, 200, 300', "no box of the form"),
            ("qwen2_5_vl", '{"bbox": [100, 200, 300, 400]}', "no box of the form"),
            ("qwen3_vl", '{"bbox_2d": [100, 900, 300, 400]}', "inverted"),
            ("list_pixels", "[300, 200, 100, 400]", "inverted"),
            ("bbox_pixels", "[100, 200, 300, 400]", "no box of the form"),
            ("bbox_pixels", '{"box": [100, 200, 300, 400]}', "no box of the form"),
            ("bbox_1000", '{"bbox": [100, 900, 300, 400]}', "inverted"),
        ],
    )
    def test_unsound_box(self, name: str, text: str, reason: str) -> None:
        result = CODECS[name].decode_one(text, SEEN)
        assert isinstance(result, Unparsable)
        assert reason in result.reason

    def test_a_box_without_area_is_a_box(self) -> None:
        assert CODECS["llava"].decode_one("[0.50, 0.50, 0.50, 0.50]") == (0.5, 0.5, 0.5, 0.5)

    @pytest.mark.parametrize("name", CODECS)
    @settings(deadline=None)
    @given(text=st.text(alphabet="[](){}<>;,. -0123456789ean", max_size=60))
    def test_any_text_gives_sound_boxes_or_a_reason(self, name: str, text: str) -> None:
        result = CODECS[name].decode(text, SEEN)
        if isinstance(result, Unparsable):
            assert result.reason
        else:
            assert result
            for x1, y1, x2, y2 in result:
                assert -math.inf < x1 <= x2 < math.inf
                assert -math.inf < y1 <= y2 < math.inf


class TestNames:
    def test_another_name_is_told_with_the_nearest(self) -> None:
        with pytest.raises(InputError, match="did you mean 'bbox_1000'") as caught:
            box_codec("bbox_100")
        assert all(name in caught.value.hint for name in CODECS)
        with pytest.raises(InputError, match=r"xxx': is not a box format \(box formats"):
            box_codec("x" * 10**6)
        with pytest.raises(ValueError, match="is not a box format"):
            known("list")

    @pytest.mark.parametrize("name", CODECS)
    def test_a_name_leads_to_its_codec(self, name: str) -> None:
        assert box_codec(name) is CODECS[known(name)]


class TestFrames:
    @pytest.mark.parametrize(
        ("frame", "extent", "pixels"),
        [
            ("image", (640, 428), (64.0, 107.0, 320.0, 428.0)),
            ("padded_square", (640, 428), (64.0, 54.0, 320.0, 534.0)),
            ("padded_square", (428, 640), (-42.0, 160.0, 214.0, 640.0)),
            ("padded_square", (640, 427), (64.0, 54.0, 320.0, 534.0)),  # offset 106, not 106.5
            ("padded_square", (100, 100), (10.0, 25.0, 50.0, 100.0)),
        ],
    )
    def test_known_values(self, frame: Frame, extent: tuple[int, int], pixels: Box) -> None:
        assert to_pixels((0.1, 0.25, 0.5, 1.0), frame, *extent) == pytest.approx(pixels)

    @settings(deadline=None)
    @given(
        box=normalised_boxes(),
        frame=st.sampled_from(FRAMES),
        width=st.integers(1, 5000),
        height=st.integers(1, 5000),
    )
    def test_round_trip(self, box: Box, frame: Frame, width: int, height: int) -> None:
        back = from_pixels(to_pixels(box, frame, width, height), frame, width, height)
        assert back == pytest.approx(box, abs=1e-12)

    @settings(deadline=None)
    @given(
        box=normalised_boxes(),
        frame=st.sampled_from(FRAMES),
        width=st.integers(1, 5000),
        height=st.integers(1, 5000),
    )
    def test_clamped_boxes_lie_on_the_image(self, box: Box, frame: Frame, width: int, height: int) -> None:
        x1, y1, x2, y2 = to_pixels(box, frame, width, height, clamp=True)
        assert 0 <= x1 <= x2 <= width
        assert 0 <= y1 <= y2 <= height
        assert all(0 <= value <= 1 for value in from_pixels((x1, y1, x2, y2), frame, width, height))

    @settings(deadline=None)
    @given(width=st.integers(1, 5000), height=st.integers(1, 5000), frame=st.sampled_from(FRAMES))
    def test_the_whole_image_can_be_written(self, width: int, height: int, frame: Frame) -> None:
        whole = from_pixels((0, 0, width, height), frame, width, height)
        assert to_pixels(whole, frame, width, height) == pytest.approx((0, 0, width, height), abs=1e-9)
        CODECS["llava"].encode(whole)

    def test_clamping_is_asked_for(self) -> None:
        assert to_pixels((0.0, 0.0, 1.0, 1.0), "padded_square", 100, 50) == (0.0, -25.0, 100.0, 75.0)
        assert to_pixels((0.0, 0.0, 1.0, 1.0), "padded_square", 100, 50, clamp=True) == (0, 0, 100, 50)
        assert from_pixels((-10, 0, 110, 50), "image", 100, 50) == pytest.approx((-0.1, 0, 1.1, 1))
        assert from_pixels((-10, 0, 110, 50), "image", 100, 50, clamp=True) == (0, 0, 1, 1)

    def test_a_box_in_the_padding_loses_its_area(self) -> None:
        assert to_pixels((0.2, 0.0, 0.4, 0.1), "padded_square", 100, 50, clamp=True) == (20, 0, 40, 0)

    @pytest.mark.parametrize(("width", "height"), [(90, 40), (40, 90), (61, 30), (30, 61)])
    def test_the_frame_is_the_one_the_model_sees(self, width: int, height: int) -> None:
        """Independent of the arithmetic: a white rectangle is found where the box says it is."""
        image = np.zeros((height, width, 3), np.uint8)
        image[10:20, 5:25] = 255
        side = max(width, height)
        how = SquareLayout(
            size=side, fit="pad", background=(0, 0, 0), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
        )
        seen = np.asarray(fit(Image.fromarray(image), how))[..., 0] > 127
        rows, columns = np.nonzero(seen)
        found = (columns.min() / side, rows.min() / side, (columns.max() + 1) / side, (rows.max() + 1) / side)
        assert to_pixels(found, "padded_square", width, height) == pytest.approx((5, 10, 25, 20))

    @pytest.mark.parametrize("convert", [to_pixels, from_pixels])
    def test_refused(self, convert: Callable[..., Box]) -> None:
        for box, frame, extent, message in [
            ((math.nan, 0, 1, 1), "image", (10, 10), "not finite"),
            ((0, 0, math.inf, 1), "image", (10, 10), "not finite"),
            ((0.6, 0, 0.5, 1), "image", (10, 10), "inverted"),
            ((0, 0.6, 1, 0.5), "padded_square", (10, 10), "inverted"),
            ((0, 0, 1, 1), "image", (0, 10), "no area"),
            ((0, 0, 1, 1), "crop", (10, 10), "unknown frame"),
        ]:
            with pytest.raises(ValueError, match=message):
                convert(box, frame, *extent)
