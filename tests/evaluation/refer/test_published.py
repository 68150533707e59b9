"""Every protocol against the arithmetic of its authors' evaluator, written out again here: hits are equal in both directions.

The references below search with the authors' own patterns and compute in torch where they do. The package reads answers in other ways
(one pass over a line), and computes in NumPy and Python alone.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gap_export import families
from gap_export.boxes.codecs import CODECS, Box, Size
from gap_export.bundle.manifest import BoxFormat
from gap_export.evaluation.refer.protocols import protocol_of, score
from gap_export.evaluation.refer.published import METRICS, metric_of

Reference = Callable[[str, Box, Size], bool]
"""(answer, true box, size of the image) -> whether the authors' evaluator counts a hit."""


def torch_iou(box: torch.Tensor, truth: torch.Tensor) -> float:
    """[4] and [4], float32; torchvision's order of operations."""
    corner = torch.max(box[:2], truth[:2])
    extent = (torch.min(box[2:], truth[2:]) - corner).clamp(min=0)
    common = extent[0] * extent[1]
    area = (box[2] - box[0]) * (box[3] - box[1])
    true_area = (truth[2] - truth[0]) * (truth[3] - truth[1])
    return (common / (area + true_area - common)).item()


def bracketed(answer: str) -> torch.Tensor:
    """What ConvLLaVA's and InternVL's evaluators read."""
    found = re.findall(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*", answer)
    numbers = (0.0, 0.0, 0.0, 0.0)
    with contextlib.suppress(IndexError, ValueError):
        numbers = tuple(float(found[0][place]) for place in range(4))  # type: ignore[assignment]
    box = torch.tensor(numbers, dtype=torch.float32)
    return box / 1000 if box.sum() >= 4 else box


def convllava(answer: str, truth: Box, size: Size) -> bool:
    width, height = size
    x1, y1, x2, y2 = (bracketed(answer) * max(size)).tolist()
    across, down = max(0, height - width) // 2, max(0, width - height) // 2
    box = torch.tensor([x1 - across, y1 - down, x2 - across, y2 - down])
    return torch_iou(box, torch.tensor(truth)) >= 0.5


def internvl(answer: str, truth: Box, size: Size) -> bool:
    box = bracketed(answer) * torch.tensor([*size, *size])
    return torch_iou(box, torch.tensor(truth)) >= 0.5


def qwen_vl(answer: str, truth: Box, size: Size) -> bool:
    found = re.findall(r"\((.*?)\),\((.*?)\)", answer)
    numbers = [0.0] * 4
    with contextlib.suppress(IndexError, ValueError):
        (x1, y1), (x2, y2) = (map(float, half.split(",")) for half in found[0])
        numbers = [x1, y1, x2, y2]
    box = torch.tensor(numbers, dtype=torch.float32) / 1000 * torch.tensor([*size, *size])
    return torch_iou(box, torch.tensor(truth)) >= 0.5


def shikra(answer: str, truth: Box, size: Size) -> bool:
    number = r"\d(?:\.\d*)?"
    four = rf"{number}(?:,{number}){{3}}"
    found = re.findall(rf"\[{four}(?:;{four})*\]", answer)
    groups = [[[float(edge) for edge in box.split(",")] for box in group[1:-1].split(";")] for group in found]
    box = groups[0][0] if len(groups) == 1 and len(groups[0]) == 1 else [0.0] * 4
    side, (width, height) = max(size), size
    left, top = (side - width) // 2, (side - height) // 2
    moved = [truth[0] + left, truth[1] + top, truth[2] + left, truth[3] + top]
    written = [round(max(0.0, min(edge / side, 1.0)), 3) for edge in moved]
    return torch_iou(torch.tensor(box) * 1000, torch.tensor(written) * 1000) > 0.5


def minigpt_v2(answer: str, truth: Box, size: Size) -> bool:
    answer = answer.replace("<unk>", "").replace(" ", "").strip()
    if not re.match(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}", answer):
        return False
    numbers = [int(number) for number in re.findall(r"\d+", answer)]
    if len(numbers) != 4:
        return False
    x1, y1 = numbers[0] / 100.0 * size[0], numbers[1] / 100.0 * size[1]
    x2, y2 = numbers[2] / 100.0 * size[0], numbers[3] / 100.0 * size[1]
    x3, y3, x4, y4 = truth
    common = max(0, min(x2, x4) - max(x1, x3) + 1) * max(0, min(y2, y4) - max(y1, y3) + 1)
    union = (x2 - x1 + 1) * (y2 - y1 + 1) + (x4 - x3 + 1) * (y4 - y3 + 1) - common
    return union != 0 and common / union > 0.5


def float_iou(box: Box, truth: Box) -> float:
    common = max(0, min(box[2], truth[2]) - max(box[0], truth[0])) * max(
        0, min(box[3], truth[3]) - max(box[1], truth[1])
    )
    area = (box[2] - box[0]) * (box[3] - box[1])
    union = (truth[2] - truth[0]) * (truth[3] - truth[1]) + area - common
    return common / union if union else 0.0


def lmms_eval(answer: str, truth: Box, size: Size) -> bool:
    number = r"(-?\d+(?:\.\d+)?)"
    found = re.search(rf"\[\s*{number},\s*{number},\s*{number},\s*{number}\s*\]", answer)
    box = tuple(float(found[place]) for place in range(1, 5)) if found else (0.0,) * 4
    true = (truth[0] / size[0], truth[1] / size[1], truth[2] / size[0], truth[3] / size[1])
    return float_iou(box, true) >= 0.5  # type: ignore[arg-type]


def qwen3_vl(answer: str, truth: Box, size: Size) -> bool:
    return _notebook(answer, truth, size, (1000, 1000), cut=False)


def qwen2_5_vl(answer: str, truth: Box, size: Size) -> bool:
    """The image is seen at twice its size."""
    return _notebook(answer, truth, size, (2 * size[0], 2 * size[1]), cut=True)


def _notebook(answer: str, truth: Box, size: Size, far: Size, *, cut: bool) -> bool:
    lines = answer.splitlines()
    for number, line in enumerate(lines):
        if line == "```json":
            answer = "\n".join(lines[number + 1 :]).split("```")[0]
            break
    try:
        try:
            found = ast.literal_eval(answer)
        except Exception:
            found = ast.literal_eval(answer[: answer.rfind('"}') + len('"}')] + "]")
        found = found if isinstance(found, list) else [found]
        x1, y1, x2, y2 = (found[0]["bbox_2d"][place] / far[place % 2] for place in range(4))
    except Exception:
        return False
    if cut:
        x1, y1, x2, y2 = (max(0.0, min(edge, 1.0)) for edge in (x1, y1, x2, y2))
    return float_iou((x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]), truth) >= 0.5


UNC: dict[str, Reference] = {
    "llava": convllava,
    "shikra": shikra,
    "minigpt_v2": minigpt_v2,
    "internvl": internvl,
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
"""By codec, in the frame of the family that gave it its name."""


def hits(codec: str, answer: str, truth: Box, size: Size, protocol: str = "unc") -> bool:
    """What the package says."""
    frame = "padded_square" if codec in ("llava", "shikra") else "image"
    seen = (2 * size[0], 2 * size[1])
    return score(
        answer, truth, size, protocol_of(protocol, BoxFormat(codec=codec, frame=frame)), seen=seen
    ).hit


SQUARE, TRUTH = (1000, 1000), (100.0, 200.0, 500.0, 800.0)
WIDE, LOW = (200, 100), (20.0, 10.0, 120.0, 90.0)
"""Of a square of 200, the image is the 100 rows from 50 on: its box there is 20, 60, 120, 140."""

HALF_X = (100.0, 200.0, 300.0, 800.0)
"""Half of TRUTH, so that the overlap is exactly one half."""

CASES: dict[str, list[tuple[str, Box, Size, bool]]] = {
    "llava": [
        ("[0.10, 0.20, 0.50, 0.80]", TRUTH, SQUARE, True),
        ("[.1,.2,.5,.8]", TRUTH, SQUARE, True),
        ("[1e-1, 2e-1, 5e-1, 8e-1]", TRUTH, SQUARE, True),
        ("[[0.10, 0.20, 0.50, 0.80]]</s>", TRUTH, SQUARE, True),
        ("[100, 200, 500, 800]", TRUTH, SQUARE, True),
        ("[0.10, 0.20, 0.50, 1.01]", TRUTH, SQUARE, True),
        ("[-0.02, 0.20, 0.50, 0.80]", TRUTH, SQUARE, True),
        # 400 x 600 of a box that goes on beyond the edge, to 400 x 1210: 0.496, where the box cut there would be 0.5.
        ("[0.10, 0.00, 0.50, 1.21]", TRUTH, SQUARE, False),
        ("[0.10, 0.00, 0.50, 1.00]", (100.0, 0.0, 500.0, 500.0), SQUARE, True),
        ("[0.50, 0.80, 0.10, 0.20]", TRUTH, SQUARE, False),
        ("[10%, 20%, 50%, 80%]", TRUTH, SQUARE, False),
        ("(0.10, 0.20, 0.50, 0.80)", TRUTH, SQUARE, False),
        ("[0.10; 0.20; 0.50; 0.80]", TRUTH, SQUARE, False),
        ("[a, b, c, d] [0.10, 0.20, 0.50, 0.80]", TRUTH, SQUARE, False),
        ("[0.10, 0.20\n[0.10, 0.20, 0.50, 0.80]", TRUTH, SQUARE, True),
        ("[0.10, 0.30, 0.60, 0.70]", LOW, WIDE, True),
        ("[0.10, 0.10, 0.60, 0.90]", LOW, WIDE, True),
        ("[0.10, 0.00, 0.60, 0.40]", LOW, WIDE, False),
    ],
    "shikra": [
        ("Answer: [0.100,0.200,0.500,0.800] .", TRUTH, SQUARE, True),
        ("[0.100,0.200,0.300,0.800]", TRUTH, SQUARE, False),  # exactly one half
        ("[0.100,0.200,0.301,0.800]", TRUTH, SQUARE, True),
        # 1000 x 500 beyond the edge to 1000 x 1001: cut, it would hit.
        ("[0.000,0.000,1.000,1.001]", (0.0, 0.0, 1000.0, 500.4), SQUARE, False),
        ("[0.000,0.000,1.000,1.000]", (0.0, 0.0, 1000.0, 500.6), SQUARE, True),
        ("[0.100, 0.200, 0.500, 0.800]", TRUTH, SQUARE, False),
        ("[.1,.2,.5,.8]", TRUTH, SQUARE, False),
        ("[-0.010,0.200,0.500,0.800]", TRUTH, SQUARE, False),
        ("[0.100,0.200,0.500,0.800;0.1,0.2,0.3,0.4]", TRUTH, SQUARE, False),
        ("[0.100,0.200,0.500,0.800] or [0.1,0.2,0.3,0.4]", TRUTH, SQUARE, False),
        ("[0.100,0.300,0.600,0.700]", LOW, WIDE, True),
    ],
    "minigpt_v2": [
        ("{<10><20><50><80>}", TRUTH, SQUARE, True),
        ("{<10> <20> <50> <80>}<unk>", TRUTH, SQUARE, True),
        (" {<10><20><50><80>} it is", TRUTH, SQUARE, True),
        ("{<10><20><50><101>}", TRUTH, SQUARE, True),
        # 201 x 601 of 401 x 601 pixels, where 200 x 600 of 400 x 600 would be exactly one half.
        ("{<10><20><30><80>}", TRUTH, SQUARE, True),
        ("the mug {<10><20><50><80>}", TRUTH, SQUARE, False),
        ("{<10><20><50><80>} 1", TRUTH, SQUARE, False),
        ("{<10><20><50><80>}<delim>{<10><20><50><80>}", TRUTH, SQUARE, False),
        ("{<10><20><50><1000>}", TRUTH, SQUARE, False),
        ("{<-1><20><50><80>}", TRUTH, SQUARE, False),
        ("{<50><80><10><20>}", TRUTH, SQUARE, False),
    ],
    "internvl": [
        ("<ref>a</ref><box>[[100, 200, 500, 800]]</box>", TRUTH, SQUARE, True),
        ("[[100.0, 200.0, 500.0, 800.0]]", TRUTH, SQUARE, True),
        ("[[0.10, 0.20, 0.50, 0.80]]", TRUTH, SQUARE, True),
        ("[[100, 200, 500, 1003]]", TRUTH, SQUARE, True),
        ("[[-2, 200, 500, 800]]", TRUTH, SQUARE, True),
        ("[[100, 200, 300, 800]]", TRUTH, SQUARE, True),  # exactly one half
        ("[[100, 200, 299, 800]]", TRUTH, SQUARE, False),
        ('[{"bbox_2d": [100, 200, 500, 800]}]', TRUTH, SQUARE, False),
        ("[[500, 800, 100, 200]]", TRUTH, SQUARE, False),
        ("[[1, 1, 1, 0.9]]", (0.0, 0.0, 1000.0, 1000.0), SQUARE, False),
        ("[[0, 0, 1, 1]]", (0.0, 0.0, 1000.0, 1000.0), SQUARE, True),
        ("[[nan, 200, 500, 800]]", TRUTH, SQUARE, False),
    ],
    "qwen2_vl": [
        ("<|box_start|>(100,200),(500,800)<|box_end|>", TRUTH, SQUARE, True),
        ("(100, 200),( 500 ,800)", TRUTH, SQUARE, True),
        ("(100.0,2e2),(500,800)", TRUTH, SQUARE, True),
        ("(100,200),(500,1003)", TRUTH, SQUARE, True),
        ("(100,200),(300,800)", TRUTH, SQUARE, True),  # exactly one half
        ("(100,200),(299,800)", TRUTH, SQUARE, False),
        ("(100,200), (500,800)", TRUTH, SQUARE, False),
        ("(a) (100,200),(500,800)", TRUTH, SQUARE, False),
        ("\uff08100\uff0c200\uff09\uff0c\uff08500\uff0c800\uff09", TRUTH, SQUARE, False),
        ("[100, 200, 500, 800]", TRUTH, SQUARE, False),
        ("(500,800),(100,200)", TRUTH, SQUARE, False),
        ("(100,200,500),(800)", TRUTH, SQUARE, False),
    ],
    "qwen2_5_vl": [
        ('```json\n[\n\t{"bbox_2d": [200, 400, 1000, 1600], "label": "a"}\n]\n```', TRUTH, SQUARE, True),
        ('{"bbox_2d": [200, 400, 1000, 1600]}', TRUTH, SQUARE, True),
        # Cut at 2000, the edge of the image as seen: exactly one half.
        ('[{"bbox_2d": [0, 0, 2000, 9000]}]', (0.0, 0.0, 1000.0, 500.0), SQUARE, True),
        ('[{"bbox_2d": [200, 400, 1000, 1600], "label": "a"}, {"bbox_2d": [1, 2', TRUTH, SQUARE, True),
        ('[{"bbox_2d": [200, 400, 1000, 1600], "la', TRUTH, SQUARE, False),
        ("[200, 400, 1000, 1600]", TRUTH, SQUARE, False),
    ],
    "qwen3_vl": [
        (
            '```json\n[{"bbox_2d": [100, 200, 500, 800], "label": "a"}]\n```\nThat is all.',
            TRUTH,
            SQUARE,
            True,
        ),
        ("[{'bbox_2d': [100, 200, 500, 800]}]", TRUTH, SQUARE, True),
        ('[{"bbox_2d": [100, 200, 500, 800,]}]', TRUTH, SQUARE, True),
        ('[{"bbox_2d": [100, 200, 500, 1003]}]', TRUTH, SQUARE, True),
        ('[{"bbox_2d": [100, 200, 300, 800]}]', TRUTH, SQUARE, True),  # exactly one half
        # Beyond the edge, 1000 x 1001 of which 1000 x 500 is true: cut, it would hit.
        ('[{"bbox_2d": [0, 0, 1000, 1001]}]', (0.0, 0.0, 1000.0, 500.0), SQUARE, False),
        ('[{"bbox_2d": [500, 800, 100, 200]}]', TRUTH, SQUARE, False),
        ('[{"bbox_2d": [0, 0, 0, 0]}, {"bbox_2d": [100, 200, 500, 800]}]', TRUTH, SQUARE, False),
        ('[{"bbox": [100, 200, 500, 800]}]', TRUTH, SQUARE, False),
        ('[{"bbox_2d": ["100", "200", "500", "800"]}]', TRUTH, SQUARE, False),
        ('[{"bbox_2d": [[100, 200, 500, 800]]}]', TRUTH, SQUARE, False),
        ('{"bbox_2d": [100 200 500 800]}', TRUTH, SQUARE, False),
        ('It is at [{"bbox_2d": [100, 200, 500, 800]}]', TRUTH, SQUARE, False),
        ("(100,200),(500,800)", TRUTH, SQUARE, False),
    ],
}

LMMS_EVAL: list[tuple[str, Box, Size, bool]] = [
    ("[0.10, 0.20, 0.50, 0.80]", TRUTH, SQUARE, True),
    ("[0.10,0.20,0.50,0.80]</s>", TRUTH, SQUARE, True),
    ("[0.10, 0.20, 0.50, 1.01]", TRUTH, SQUARE, True),
    ("[-0.01, 0.20, 0.50, 0.80]", TRUTH, SQUARE, True),
    ("[x] [0.1, 0.2, 0.5, 0.8] [0, 0, 1, 1]", TRUTH, SQUARE, True),
    # Boxes of the padded square are read as boxes of the image: too low and too flat. (Half of it, but for rounding.)
    ("[0.10, 0.30, 0.60, 0.70]", LOW, WIDE, False),
    ("[0.10, 0.10, 0.60, 0.90]", LOW, WIDE, True),
    ("[0.10, 0.40, 0.60, 0.70]", LOW, WIDE, False),
    ("[.10, .20, .50, .80]", TRUTH, SQUARE, False),
    ("[1e-1, 2e-1, 5e-1, 8e-1]", TRUTH, SQUARE, False),
    ("[0.10 , 0.20, 0.50, 0.80]", TRUTH, SQUARE, False),
    ("[10%, 20%, 50%, 80%]", TRUTH, SQUARE, False),
    ("[0.50, 0.80, 0.10, 0.20]", TRUTH, SQUARE, False),
    ("(0.10, 0.20, 0.50, 0.80)", TRUTH, SQUARE, False),
    ("[100, 200, 500, 800]", TRUTH, SQUARE, False),
]


def test_every_codec_has_an_evaluator_and_a_reference() -> None:
    """Those of models that were tuned further have none: nothing is published that reads them."""
    tuned = {"box_start_pixels", "list_pixels", "bbox_pixels", "bbox_1000"}
    assert METRICS.keys() == UNC.keys() == CASES.keys() == CODECS.keys() - tuned
    assert all(metric_of(CODECS[name]).name == f"the codec {name}" for name in tuned)


@pytest.mark.parametrize(
    ("codec", "answer", "truth", "size", "hit"),
    [(codec, *case) for codec, cases in CASES.items() for case in cases],
)
def test_a_hit_is_what_the_authors_call_one(
    codec: str, answer: str, truth: Box, size: Size, hit: bool
) -> None:
    assert UNC[codec](answer, truth, size) is hit, "the case is not what it says"
    assert hits(codec, answer, truth, size) is hit


@pytest.mark.parametrize(("answer", "truth", "size", "hit"), LMMS_EVAL)
@pytest.mark.parametrize("family", families.names())
def test_lmms_eval_reads_all_families_alike(
    family: str, answer: str, truth: Box, size: Size, hit: bool
) -> None:
    assert lmms_eval(answer, truth, size) is hit, "the case is not what it says"
    protocol = protocol_of("lmms-eval", families.row(family).box)
    assert score(answer, truth, size, protocol).hit is hit


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Near the forms that are read, in the numbers and in what stands around them."""
    scale = draw(st.sampled_from([1, 1, 10, 100, 999, 1000]))
    step = draw(st.sampled_from([0.01, 0.25, 0.5, 1.0]))
    number = st.integers(-1, round(1.2 / step)).map(lambda steps: steps * step * scale)
    form = draw(st.sampled_from(["{:g}", "{:.2f}", "{:.3f}", "{:.0f}", " {:g}", "<{:.0f}>"]))
    template = draw(
        st.sampled_from(
            [
                "[{},{},{},{}]",
                "[[{}, {}, {}, {}]]",
                "{{{}{}{}{}}}",
                "({},{}),({},{})",
                '[{{"bbox_2d": [{}, {}, {}, {}], "label": "a"}}]',
                "[{},{},{},{};{},{},{},{}]",
                "[{}, {}\n[{}, {}, {}, {}]",
            ]
        )
    )
    numbers = (form.format(draw(number)) for _ in range(8))
    around = st.sampled_from(["", "", "", "[", "a ", "(", "\n", "]", "1"])
    return draw(around) + template.format(*numbers) + draw(around)


BOXES = st.sampled_from(
    [(0.0, 0.0, 50.0, 50.0), (0.0, 0.0, 100.0, 50.0), (25.0, 25.0, 75.0, 75.0), (10.3, 0.7, 80.2, 49.9)]
)
SIZES = st.sampled_from([(100, 100), (100, 75), (100, 101), (640, 427)])


@pytest.mark.parametrize("codec", [*UNC, "lmms-eval"])
@settings(deadline=None, max_examples=60)
@example(answer="[0,0,1.0,0.5]", truth=(0.0, 0.0, 50.0, 50.0), size=(100, 100))
@given(answer=answers(), truth=BOXES, size=SIZES)
def test_any_answer_is_judged_as_by_the_authors(codec: str, answer: str, truth: Box, size: Size) -> None:
    if codec == "lmms-eval":
        assert hits("llava", answer, truth, size, "lmms-eval") is lmms_eval(answer, truth, size)
    else:
        assert hits(codec, answer, truth, size) is UNC[codec](answer, truth, size)


@pytest.mark.parametrize("codec", UNC)
@settings(deadline=None, max_examples=30)
@given(text=st.text(alphabet="[](){}<>;,.:\"'\n -0123456789enab_2dox", max_size=80))
def test_no_answer_breaks_an_evaluator(codec: str, text: str) -> None:
    assert hits(codec, text, TRUTH, SQUARE) in (True, False)


@pytest.mark.parametrize("codec", UNC)
@pytest.mark.parametrize("text", ["[" * 20_000, "[" + "," * 20_000, "((" + "),(" * 10_000])
def test_long_answers_are_read_in_one_pass(codec: str, text: str) -> None:
    assert not hits(codec, text, TRUTH, SQUARE)


def test_boxes_leave_the_image_as_they_were_written() -> None:
    result = score("[0.1, 0.2, 0.5, 1.01]", TRUTH, SQUARE, protocol_of("unc", families.row("llava").box))
    assert result.box == pytest.approx((100, 200, 500, 1010))
    assert result.iou == pytest.approx(600 / 810)


def test_protocols_that_do_not_read_a_family_say_so() -> None:
    readable = {
        name for name in families.names() if protocol_of("lmms-eval", families.row(name).box).reads_the_codec
    }
    assert "llava" in readable
    assert "shikra" in readable
    assert not readable & {"minigpt_v2", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    assert "are not read" in protocol_of("lmms-eval", families.row("qwen2_vl").box).description
    assert all(protocol_of("unc", families.row(name).box).reads_the_codec for name in families.names())
