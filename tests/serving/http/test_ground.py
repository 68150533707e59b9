"""`/v1/ground` and `/v1/infer`: the boxes of `model.ground`, in the frame of the image as displayed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from gap_export.bundle.golden import renumbered
from gap_export.runtime.model import Model
from gap_export.serving.images import ImageBounds
from gap_export.serving.metrics import ServerMetrics
from gap_export.serving.receipts import receipt_of
from tests.serving.http.conftest import Serve
from tests.serving.http.serving_http import Running, data_url, noise

Scene = tuple[Image.Image, str]


def ground(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/ground", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(server: Running, path: str = "/v1/ground", **body: Any) -> tuple[int, str, str | None]:
    """(status, message, field), after a look at their form."""
    answer = server.http.post(path, json=body)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    return answer.status_code, error["message"], error["param"]


@pytest.mark.parametrize("keep", [None, 0.5, 1.0])
def test_boxes_are_those_of_the_python_api(
    keep: float | None, running: Running, shapes_alone: Model, scene: Scene, scene_url: str
) -> None:
    image, expression = scene
    expected = shapes_alone.ground(image, expression, keep=keep)
    reply = ground(running, image=scene_url, expression=expression, keep=keep, evidence=True)
    assert (reply["frame"], reply["image"]) == ("image as displayed", {"width": 96, "height": 96})
    (result,) = reply["results"]
    assert result["raw"] == expected.text
    assert [tuple(box["pixels"]) for box in result["boxes"]] == list(expected.boxes)
    (box,) = result["boxes"]
    assert (box["label"], box["frame"]) == (expression, "image as displayed")
    edges = [box[name] for name in ("x_min", "y_min", "x_max", "y_max")]
    assert np.allclose(edges, np.array(expected.box) / 96)
    kept = len(expected.kept_indices)
    assert result["keep"] == {"requested": keep, "used": keep or 0.25, "tokens": kept, "of": 144}
    assert result["kept_indices"] == expected.kept_indices.tolist()
    assert result["reason"] is None
    assert set(result["timings"]) == {
        "queue", "decode_image", "vision", "prefill", "decode", "per_token", "total",
    }  # fmt: skip
    usage = result["usage"]
    assert usage["prompt_tokens_details"]["visual_tokens"] == kept
    assert usage["prompt_tokens_details"]["visual_tokens_before_pruning"] == 144
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_each_expression_has_its_own_answer_or_error(running: Running, scene: Scene, scene_url: str) -> None:
    expressions = [scene[1], "a <image> b", "the red circle"]
    reply = ground(running, image=scene_url, expressions=expressions)
    assert [result["expression"] for result in reply["results"]] == expressions
    assert ["error" in result for result in reply["results"]] == [False, True, False]
    assert "control token" in reply["results"][1]["error"]["message"]
    alone = ground(running, image={"url": scene_url}, expression="the red circle")["results"][0]
    assert reply["results"][2]["boxes"] == alone["boxes"]
    assert "kept_indices" not in alone


def test_one_expression_that_fails_is_the_whole_request(running: Running, scene_url: str) -> None:
    status, message, _ = refused(running, image=scene_url, expression="a <image> b")
    assert (status, "control token" in message) == (400, True)


def test_an_answer_without_a_box_says_why(running: Running, scene: Scene, scene_url: str) -> None:
    reply = ground(running, image=scene_url, expression=scene[1], max_new_tokens=3)
    (result,) = reply["results"]
    assert result["boxes"] == []
    assert result["raw"]
    assert result["finish_reason"] == "length"
    assert result["reason"] == "the answer was cut off after 3 tokens, and no box of it can be read"


def test_boxes_are_on_the_image_as_displayed(running: Running, shapes_alone: Model, scene: Scene) -> None:
    """A camera stores the pixels turned, and says so."""
    image, expression = scene
    wide = Image.new("RGB", (140, 96), (127, 127, 127))
    wide.paste(image, (20, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = data_url(wide.transpose(Image.Transpose.ROTATE_90), exif=exif)
    reply = ground(running, image=stored, expression=expression)
    assert reply["image"] == {"width": 140, "height": 96}
    expected = shapes_alone.ground(wide, expression)
    assert [tuple(box["pixels"]) for box in reply["results"][0]["boxes"]] == list(expected.boxes)


def test_receipts_are_given_where_they_are_made(
    running: Running, serve: Serve, scene: Scene, scene_url: str
) -> None:
    body = {"image": scene_url, "expressions": [scene[1], "the red circle"], "receipt": True}
    assert refused(running, **body)[:2] == (
        400, "receipts: are not given by this server (leave receipt out)",
    )  # fmt: skip
    server = serve(service={"receipt_of": receipt_of})
    receipts = [result["receipt"] for result in ground(server, **body)["results"]]
    assert [receipt["expression"] for receipt in receipts] == body["expressions"]
    assert receipts[0]["images"][0]["size"] == [96, 96]


def test_an_answer_that_stands_elsewhere_is_not_given_a_receipt(
    serve: Serve, scene: Scene, scene_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids are renumbered on the way into the session, as by a fault in it."""
    metrics = ServerMetrics()
    server = serve(service={"receipt_of": receipt_of, "metrics": metrics})
    monkeypatch.setattr("gap_export.serving.http.ground.placed_by", lambda *_: renumbered)
    body = {"image": scene_url, "expression": scene[1]}
    reply = server.http.post("/v1/ground", json={**body, "receipt": True})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_computed_as_stated")
    assert "ask another server" in reply.json()["error"]["message"]
    assert int(reply.headers["Retry-After"]) >= 60
    assert metrics.registry.get_sample_value("gap_receipt_mismatch_total") == 1
    monkeypatch.undo()
    # It is not trusted with anything further, a receipt or none.
    assert server.http.get("/v1/health/ready").json() == {"status": "failed"}
    reply = server.http.post("/v1/ground", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert metrics.registry.get_sample_value("gap_receipt_mismatch_total") == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image": None}, "image: give either image or images"),
        ({"expression": None}, "give either expression or expressions"),
        ({"expressions": ["a"]}, "give either expression or expressions"),
        ({"expression": None, "expressions": []}, "expressions: must have at least 1"),
        ({"expression": None, "expressions": ["a"] * 17}, "expressions: must have at most 16"),
        ({"expression": None, "expressions": ["a", 3]}, "expressions[1]: must be text"),
        ({"expression": 3}, "expression: must be text"),
        ({"expression": " "}, "is empty"),
        ({"keep": 0}, "keep: must be greater than 0.0"),
        ({"keep": 1.5}, "keep: must be at most 1.0"),
        ({"keep": "0.5"}, "keep: must be a number"),
        ({"keep": True}, "keep: must be a number"),
        ({"keep": 0.01}, "keep"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: must be a whole number"),
        ({"max_new_tokens": 10_000}, "10000"),
        ({"receipt": 1}, "receipt: must be true or false"),
        ({"kep": 0.5, "sed": 1}, "kep, sed: is not a field here"),
        ({"image": "http://example.org/a.png"}, "this server fetches none"),
        ({"image": "/etc/passwd"}, "is no data URL of an image"),
        ({"image": "file:///etc/passwd"}, "is no data URL of an image"),
        ({"image": "data:text/plain;base64,AAAA"}, "is no data URL of an image in base64"),
        ({"image": "data:image/png,AAAA"}, "is no data URL of an image in base64"),
        ({"image": "data:image/png;base64,AA AA"}, "is not base64"),
        ({"image": "data:image/png;base64,"}, "is not base64"),
        ({"image": {"url": "x", "link": "y"}}, "image.link: is not a field here"),
        ({"image": {}}, "image.url: is missing"),
        ({"image": {"url": "data:", "detail": "high"}}, "image.detail"),
        ({"images": ["data:"], "image": "data:"}, "give either image or images"),
        ({"expression": "x" * 100_001}, "the texts have 100001 characters, and may have 100000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], named: str, running: Running, scene_url: str
) -> None:
    body = {"image": scene_url, "expression": "the red circle", **changes}
    status, message, _ = refused(
        running, **{name: value for name, value in body.items() if value is not None}
    )
    assert (status, named in message) == (400, True), message


def test_images_are_bounded(serve: Serve) -> None:
    server = serve(images=ImageBounds(encoded_bytes=100_000, pixels=200_000, side=600))
    for image, status, named in (
        (data_url(noise(3, 40)), 422, "is 3x40 pixels, and no side may be shorter than 4"),
        (data_url(noise(700, 4)), 422, "no side may be longer than 600"),
        (data_url(Image.new("RGB", (500, 500))), 422, "may have 200,000 altogether"),
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", 422, "is no image in a known format"),
        (data_url(noise(64, 64))[:-4000], 422, "cannot be decoded"),
        ("data:image/svg+xml;base64,PHN2Zy8+PHN2Zy8+", 422, "is no image in a known format"),
        (data_url(noise(190, 190)), 413, "has more than"),
    ):
        found = refused(server, image=image, expression="the red circle")
        assert found[0::2] == (status, "image"), found
        assert named in found[1]


def test_the_shape_of_detectors(running: Running, scene: Scene, scene_url: str) -> None:
    labels = [scene[1], "a <image> b"]
    images = [{"type": "image_url", "url": scene_url}] * 2
    answer = running.http.post("/v1/infer", json={"input": images, "labels": labels})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == [0, 1]
    expected = ground(running, image=scene_url, expression=labels[0])["results"][0]["boxes"][0]
    edges = {name: expected[name] for name in ("x_min", "y_min", "x_max", "y_max")}
    assert data[0]["bounding_boxes"] == {labels[0]: [{**edges, "confidence": 1.0}]}
    assert set(data[0]["errors"]) == {labels[1]}
    assert answer.json()["usage"]["images_size_mb"] > 0
    for body, named in (
        ({"input": images}, "labels: is missing"),
        ({"input": [], "labels": labels}, "input: must have at least 1"),
        ({"input": [{"type": "text", "url": ""}], "labels": labels}, "input[0].type: must be 'image_url'"),
        ({"input": images, "labels": ["a", "a"]}, "labels: one stands twice"),
    ):
        status, message, _ = refused(running, "/v1/infer", **body)
        assert (status, message) == (400, named)
