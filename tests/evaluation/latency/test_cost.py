"""The cost card: sums by hand, and a roofline that nothing beats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import FlopTerm, Graph
from gap_export.errors import InputError
from gap_export.evaluation.latency.bench import CandidateSpec, open_candidate, peak_of
from gap_export.evaluation.latency.candidate import candidate
from gap_export.evaluation.latency.cost import cost_of, dims_of, flops, measure_device
from gap_export.evaluation.latency.measure import measure
from gap_export.evaluation.latency.record import BenchRecord, Device
from gap_export.evaluation.latency.show import figure, tables
from gap_export.evaluation.plotting import png
from gap_export.runtime.backends import open_session

SLOW = Device(flops_per_second=1e6, bytes_per_second=1e6, threads=1)


@pytest.fixture(scope="module")
def asked(tiny_bundle: Callable[..., Bundle]) -> Any:
    bundle = tiny_bundle()
    return candidate("tiny", bundle, open_session(bundle, "onnxruntime", threads=1), batch=2)


def test_phases(asked: Any) -> None:
    manifest = asked.bundle.manifest
    card = cost_of(asked, 20, (48,), SLOW)
    decoder, vision = manifest.graphs["decoder"], manifest.graphs["vision"]
    assert card.prefill.flops == flops(decoder, {"batch": 2, "sequence": 20, "capacity": 48})
    assert card.decode.flops == flops(decoder, {"batch": 2, "sequence": 1, "capacity": 48})
    assert card.vision.flops == flops(vision, {"batch": 2})
    slot = 2 * manifest.spec.kv_heads * manifest.spec.head_dim * 4 * 2 * manifest.spec.layers
    assert card.cache_bytes == slot * 48
    assert card.prefill.bytes == decoder.weight_bytes + slot * 20
    assert card.decode.bytes == decoder.weight_bytes + card.cache_bytes
    assert card.first_token_flops == (card.vision.flops or 0) + (card.prefill.flops or 0)


@pytest.mark.parametrize(("peak", "bandwidth", "by_operations"), [(1e6, 1e12, True), (1e15, 1e3, False)])
def test_the_lower_roof_decides(asked: Any, peak: float, bandwidth: float, by_operations: bool) -> None:
    card = cost_of(asked, 20, (48,), Device(flops_per_second=peak, bytes_per_second=bandwidth, threads=1))
    expected = (card.decode.flops or 0) / peak if by_operations else card.decode.bytes / bandwidth
    assert card.decode.roofline_ms == pytest.approx(1e3 * expected)


def test_older_bundles_do_not_tell(asked: Any) -> None:
    manifest = asked.bundle.manifest
    graphs = {name: graph.model_copy(update={"flops": ()}) for name, graph in manifest.graphs.items()}
    bundle = Bundle(asked.bundle.folder, manifest.model_copy(update={"graphs": graphs}))
    card = cost_of(replace(asked, bundle=bundle), 20, (48,), SLOW)
    assert card.first_token_flops is None
    assert card.first_token_ms is None
    assert card.decode.roofline_ms is None


def test_an_extent_that_nobody_knows(asked: Any) -> None:
    graph: Graph = asked.bundle.manifest.graphs["vision"].model_copy(
        update={"flops": (FlopTerm(factor=2, dims=("batch", "windows")),)}
    )
    assert flops(graph, {"batch": 3}) is None
    assert flops(graph, {"batch": 3, "windows": 5}) == 30
    assert dims_of(graph.spec, asked.images.calls[0]) == {"batch": 2}


def test_this_machine() -> None:
    """Nothing is timed for its own sake: a machine that multiplies less than a billion numbers in a second runs no tests."""
    device = measure_device(threads=1)
    assert device.flops_per_second > 1e9
    assert device.bytes_per_second > 1e8


def test_the_record_has_a_card(asked: Any) -> None:
    record = measure([asked], requests=2, warmup=0, new_tokens=3, roofline=SLOW)
    (row,) = record.rows
    assert row.cost is not None
    assert row.roofline_fraction == pytest.approx((row.cost.first_token_ms or 0) / row.ttft_ms.p50, rel=1e-2)
    assert BenchRecord.model_validate_json(record.model_dump_json()) == record
    titles = [str(table.title) for table in tables(record)]
    assert titles[0].startswith("this machine at its best")
    assert png(figure(record)).startswith(b"\x89PNG")
    plain = measure([asked], requests=1, warmup=0, new_tokens=1)
    assert plain.rows[0].cost is None
    assert len(tables(plain)) == 1


def test_memory_is_that_of_a_process_of_its_own(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle()
    ballast = np.ones(2**26)  # 512 MB that are not its own
    peak = peak_of(partial(open_candidate, CandidateSpec("x", bundle.folder, "onnxruntime", None, 1), 1))
    assert peak is not None
    assert 2e7 < peak < ballast.nbytes
    with pytest.raises(InputError, match="cannot be chosen"):
        peak_of(partial(open_candidate, CandidateSpec("x", bundle.folder, "onnxruntime", 0.9, 1), 1))


def test_images_are_all_encoded(tiny_bundle: Callable[..., Bundle]) -> None:
    """The card counts every call of the vision graph."""
    bundle = tiny_bundle()
    one, two = (
        cost_of(
            candidate("t", bundle, open_session(bundle, "onnxruntime", threads=1), batch=batch),
            20,
            (48,),
            SLOW,
        )
        for batch in (1, 2)
    )
    assert two.vision.flops == 2 * (one.vision.flops or 0)
