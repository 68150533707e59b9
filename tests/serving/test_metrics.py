"""What is counted for Prometheus: names, kinds, and counts after requests that are known."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gap_export.bundle.folder import Bundle
from gap_export.errors import BundleError, InputError, MissingRequirementError, RecipeError, SessionError
from gap_export.serving.metrics import FAILURES, REJECTIONS, STAGES, ServerMetrics
from gap_export.serving.ready import check_ready
from gap_export.serving.work import Refused, Result, Spent
from tests.serving.asking import WAIT, assert_empty, held, scenes, talk, work_of
from tests.serving.conftest import OpenEngine

KINDS = {
    "gap_num_requests_waiting": "gauge",
    "gap_num_requests_running": "gauge",
    "gap_kv_cache_usage_perc": "gauge",
    "gap_queue_oldest_wait_seconds": "gauge",
    "gap_time_to_first_token_seconds": "histogram",
    "gap_inter_token_latency_seconds": "histogram",
    "gap_e2e_request_latency_seconds": "histogram",
    "gap_request_queue_time_seconds": "histogram",
    "gap_stage_seconds": "histogram",
    "gap_keep_ratio": "histogram",
    "gap_decode_rows": "histogram",
    "gap_request_success": "counter",
    "gap_request_failure": "counter",
    "gap_admission_rejections": "counter",
    "gap_visual_tokens": "counter",
    "gap_generation_tokens": "counter",
    "gap_images_decoded": "counter",
    "gap_receipt_mismatch": "counter",
}
LABELS = {
    "gap_stage_seconds": ("stage", set(STAGES)),
    "gap_request_success": ("finish_reason", {"stop", "length"}),
    "gap_request_failure": ("reason", set(FAILURES)),
    "gap_admission_rejections": ("reason", set(REJECTIONS)),
    "gap_visual_tokens": ("fate", {"kept", "pruned"}),
}


def families(metrics: ServerMetrics) -> dict[str, Any]:
    return {each.name: each for each in text_string_to_metric_families(metrics.render().decode())}


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Sample, its label's value behind it -> value."""
    return {
        " ".join(
            [sample.name, *(value for name, value in sample.labels.items() if name != "le")]
        ): sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def result_of(**changes: Any) -> Result:
    import numpy as np

    known: dict[str, Any] = {
        "text": "[0.1, 0.2, 0.3, 0.4]",
        "ids": (1, 2, 3),
        "finish_reason": "stop",
        "boxes": (),
        "keep": 0.25,
        "kept": 36,
        "visual_tokens": 144,
        "kept_indices": np.zeros(0, np.int64),
        "prompt_tokens": 9,
        "image_size": (96, 96),
        "spent": Spent(queue=0.5, decode_image=0.25, vision=0.125, prefill=0.0625, decode=1.0, total=2.0),
    }
    return Result(**{**known, **changes})


def test_before_the_first_request() -> None:
    """Every series is there at 0, so that rates over it are numbers."""
    metrics = ServerMetrics()
    found = families(metrics)
    assert {name: each.type for name, each in found.items()} == {
        name: kind for name, kind in KINDS.items() if kind != "gauge" and name != "gap_images_decoded"
    }
    for name, (label, known) in LABELS.items():
        assert {sample.labels[label] for sample in found[name].samples} == known
    assert set(values(metrics).values()) == {0.0}
    assert metrics.content_type.startswith("text/plain; version=")


def test_what_is_told_is_counted() -> None:
    metrics = ServerMetrics()
    metrics.answered(result_of())
    metrics.answered(result_of(finish_reason="length", visual_tokens=0, kept=0, keep=None))
    for reason in ("full", "full", "draining", "broken", "not_ready", "of a later version"):
        metrics.refused(reason)
    for given_up in ("deadline", "cancelled", "draining", "broken"):
        metrics.failed(Refused("x", reason=given_up))
    for kind in (InputError, RecipeError, SessionError, MissingRequirementError, BundleError):
        metrics.failed(kind("x", subject="x", hint="x"))
    metrics.stepped(0.25, [0.5, 0.5, 0.25])
    metrics.receipt_mismatch()
    found = values(metrics)
    assert {name: value for name, value in found.items() if value and "seconds" not in name} == {
        "gap_request_success_total stop": 1,
        "gap_request_success_total length": 1,
        "gap_admission_rejections_total full": 2,
        "gap_admission_rejections_total draining": 1,
        "gap_admission_rejections_total broken": 1,
        "gap_admission_rejections_total not_ready": 1,
        "gap_admission_rejections_total other": 1,
        "gap_request_failure_total deadline": 1,
        "gap_request_failure_total cancelled": 1,
        "gap_request_failure_total draining": 1,
        "gap_request_failure_total invalid": 2,
        "gap_request_failure_total runtime": 3,
        "gap_request_failure_total other": 1,
        "gap_visual_tokens_total kept": 36,
        "gap_visual_tokens_total pruned": 108,
        "gap_generation_tokens_total": 6,
        "gap_keep_ratio_count": 1,
        "gap_keep_ratio_sum": 0.25,
        "gap_decode_rows_count": 1,
        "gap_decode_rows_sum": 3,
        "gap_receipt_mismatch_total": 1,
    }
    assert found["gap_time_to_first_token_seconds_sum"] == 2 * 0.9375
    assert found["gap_e2e_request_latency_seconds_sum"] == 4
    assert found["gap_request_queue_time_seconds_sum"] == 1
    assert found["gap_stage_seconds_sum prefill"] == 0.125
    assert found["gap_inter_token_latency_seconds_count"] == 3
    assert found["gap_inter_token_latency_seconds_sum"] == 1.25


def test_what_an_engine_does(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    metrics, image = ServerMetrics(), scenes(1)[0].image
    engine = open_engine(shapes_bundle, rows=2, queue=2, observer=metrics)
    metrics.watch(engine)
    assert {name: each.type for name, each in families(metrics).items()} == KINDS
    with held(engine.model.session, "step") as session:  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([image], "circle", "square", "triangle"))]
        assert session.waits.wait(WAIT)
        tickets.append(engine.submit(work_of([image], "circle", keep=0.05)))
        assert tickets[1].result(WAIT)
        tickets.append(engine.submit(work_of([image], talk("circle?"), keep=1.0, max_new_tokens=2)))
        with pytest.raises(Refused):
            engine.submit(work_of([image], "circle"))
        found = values(metrics)
        assert found["gap_num_requests_waiting"] == 2
        assert found["gap_num_requests_running"] == 1
        assert 0 < found["gap_kv_cache_usage_perc"] < 0.5
        assert found["gap_queue_oldest_wait_seconds"] > 0
        session.go.set()
    results = [each for ticket in tickets for each in ticket.result(WAIT) if isinstance(each, Result)]
    assert_empty(engine)
    found = values(metrics)
    assert found["gap_num_requests_waiting"] == found["gap_num_requests_running"] == 0
    assert found["gap_kv_cache_usage_perc"] == 0
    assert found["gap_request_success_total stop"] == 3
    assert found["gap_request_success_total length"] == 1
    assert found["gap_request_failure_total invalid"] == 1
    assert found["gap_admission_rejections_total full"] == 1
    assert found["gap_images_decoded_total"] == 3
    assert found["gap_visual_tokens_total kept"] == 3 * 36 + 144
    assert found["gap_visual_tokens_total pruned"] == 3 * 108
    assert found["gap_decode_rows_count"] == engine.steps
    assert found["gap_generation_tokens_total"] == sum(len(each.ids) for each in results)
    assert found["gap_stage_seconds_count vision"] == found["gap_e2e_request_latency_seconds_count"] == 4
    stopped = sum(each.finish_reason == "stop" for each in results)
    # Every token but the first of an answer is fed for, and so is the one that ends it.
    assert (
        found["gap_inter_token_latency_seconds_count"] == sum(len(each.ids) - 1 for each in results) + stopped
    )
    assert found["gap_decode_rows_sum"] == found["gap_inter_token_latency_seconds_count"]


def test_what_a_server_asks_itself_is_not_counted(shapes_bundle: Bundle, open_engine: OpenEngine) -> None:
    metrics = ServerMetrics()
    engine = open_engine(shapes_bundle, rows=4, observer=metrics)
    metrics.watch(engine)
    assert check_ready(engine.bundle, engine).rows == 4
    assert_empty(engine)
    assert set(values(metrics).values()) == {0.0}


@pytest.mark.parametrize("ends", ["close", "fault"])
def test_every_question_that_is_given_up_has_failed(
    ends: str, shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    """They were admitted: none of them counts as one that was not."""
    metrics, image = ServerMetrics(), scenes(1)[0].image
    engine = open_engine(shapes_bundle, rows=1, observer=metrics)
    with held(engine.model.session, "encode") as session:  # type: ignore[attr-defined]
        tickets = [engine.submit(work_of([image], "circle", "square", "triangle")) for _ in range(2)]
        assert session.waits.wait(WAIT)
        if ends == "close":
            engine.give_up()
        else:
            engine._step = lambda: 1 // 0  # type: ignore[method-assign,assignment]
        session.go.set()
        outcomes = [each for ticket in tickets for each in ticket.result(WAIT)]
    engine._thread.join(WAIT)
    assert all(isinstance(each, Refused) for each in outcomes)
    found = values(metrics)
    assert found[f"gap_request_failure_total {'draining' if ends == 'close' else 'runtime'}"] == 6
    assert not any(value for name, value in found.items() if "rejections" in name)


def test_every_question_of_a_request_that_cannot_be_read_has_failed(
    shapes_bundle: Bundle, open_engine: OpenEngine
) -> None:
    metrics, image = ServerMetrics(), scenes(1)[0].image
    engine = open_engine(shapes_bundle, observer=metrics)
    engine.submit(work_of([image, image], "circle", "square")).result(WAIT)
    assert values(metrics)["gap_request_failure_total invalid"] == 2


def test_several_servers_in_a_process_count_apart() -> None:
    first, second = ServerMetrics(), ServerMetrics()
    first.refused("full")
    assert values(first)["gap_admission_rejections_total full"] == 1
    assert values(second)["gap_admission_rejections_total full"] == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=ServerMetrics().render(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
