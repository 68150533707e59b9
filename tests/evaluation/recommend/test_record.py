"""One kind of record for shares of a bundle and for pruners: what was stored before reads as it did, and neither says what is of the other."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gap_export.errors import InputError
from gap_export.evaluation.recommend.record import Recommendation

OF_A_BUNDLE = """{
  "manifest_sha256": "m",
  "protocol": "unc",
  "max_accuracy_drop": 0.02,
  "expressions": 400,
  "points": [
    {
      "keep": 1.0,
      "mean_kept": 36.0,
      "accuracy": 0.9,
      "difference": 0.0,
      "low": 0.0,
      "high": 0.0,
      "inside": true,
      "ttft_ms": 9.0,
      "speedup": 1.0
    },
    {
      "keep": 0.5,
      "mean_kept": 18.0,
      "accuracy": 0.89,
      "difference": -0.01,
      "low": -0.015,
      "high": 0.0,
      "inside": true,
      "ttft_ms": 5.0,
      "speedup": 1.8
    }
  ],
  "chosen": 0.5
}
"""
"""As it was written before there were pruners in it."""


def read(content: str) -> Recommendation:
    return Recommendation.parse(content.encode(), subject="recommend.json", hint="")


def of_pruners() -> dict[str, Any]:
    """The same numbers, of two bundles."""
    content: dict[str, Any] = json.loads(OF_A_BUNDLE)
    for point, pruner, build in zip(content["points"], ("none", "dart"), "mn", strict=True):
        point |= {"pruner": pruner, "front": True, "manifest_sha256": build}
    return content | {"chosen_pruner": "dart", "left_out": []}


def test_a_record_of_a_bundle_is_written_as_before() -> None:
    record = read(OF_A_BUNDLE)
    assert record.text() == OF_A_BUNDLE
    assert not record.of_pruners
    assert record.choice == record.points[1]


def test_a_record_of_pruners_comes_back_as_it_was() -> None:
    record = read(json.dumps(of_pruners()))
    assert record.of_pruners
    assert record.choice == record.points[1]
    assert record.choice.label == "dart, keep 0.5"
    assert read(record.text()) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda it: it.pop("left_out"), "left_out"),
        (lambda it: it.update(chosen_pruner=None), "chosen_pruner"),
        (lambda it: it.update(chosen=1.0, chosen_pruner="none"), "fastest point"),
        (lambda it: it["points"][0].pop("pruner"), "first point has no pruner"),
        (lambda it: it["points"][1].pop("pruner"), "lack pruner"),
        (lambda it: it["points"][1].pop("ttft_ms"), "ttft_ms"),
        (lambda it: it["points"][1].update(front=False), "front is False at dart, keep 0.5"),
        (lambda it: it["points"][1].update(ttft_ms=10.0), "front is True at dart"),
        (lambda it: it["points"][0].update(keep=0.9), "begin with keep 1"),
        (lambda it: it["points"].append(it["points"][1]), "comes twice"),
        (lambda it: it["points"].pop(), "at least two"),
        (lambda it: it["points"][1].update(low=-0.005), "does not lie from low -0.005 to high 0"),
        (lambda it: it["points"][1].update(high=-0.012), "does not lie from low"),
        (
            lambda it: it["points"][1].update(accuracy=0.8),
            "difference is -0.01 at dart, keep 0.5, and accuracy",
        ),
        (lambda it: it["points"][0].update(difference=0.1, high=0.2), "difference is 0.1 at none, keep 1"),
        (lambda it: it["points"][0].update(speedup=1.1), "speedup is 1.1 at none, keep 1"),
        (lambda it: it["points"][1].update(speedup=1.9), "speedup is 1.9 at dart, keep 0.5, and ttft_ms 5"),
    ],
)
def test_a_record_of_pruners_that_contradicts_itself(change: Any, words: str) -> None:
    content = of_pruners()
    change(content)
    with pytest.raises(InputError, match=words):
        read(json.dumps(content))


@pytest.mark.parametrize(
    "more", [{"left_out": []}, {"chosen_pruner": "dart"}, {"points": "front"}, {"points": "manifest_sha256"}]
)
def test_a_record_of_a_bundle_says_nothing_of_pruners(more: dict[str, Any]) -> None:
    content = json.loads(OF_A_BUNDLE)
    if "points" in more:
        content["points"][1][more["points"]] = of_pruners()["points"][1][more["points"]]
    else:
        content |= more
    with pytest.raises(InputError):
        read(json.dumps(content))
