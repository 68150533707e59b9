"""The cost card: operations and bytes of every phase, and the time that this machine needs for them at the very least.

The roofline (Williams, Waterman, Patterson 2009): no phase is faster than its operations at the machine's peak, nor than its bytes at the
machine's bandwidth. Both are measured on the spot, with as many threads as are measured with: the peak by
a large matrix product, the bandwidth by a large copy and by the product of a large matrix with a vector, whichever is faster (decoding reads and
writes next to nothing, and one core does not use all of a memory's bandwidth). What is written in a data sheet is not what a container
gets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from gap_export.bundle.manifest import FlopTerm, Graph
from gap_export.bundle.spec import Dim, GraphSpec
from gap_export.evaluation.latency.candidate import Candidate
from gap_export.evaluation.latency.record import Cost, Device, PhaseCost
from gap_export.precision import precision

_SIDE = 2048
_COPY_BYTES = 2**28
_COLUMNS = 8192
_REPEATS = 5


def measure_device(threads: int = 0) -> Device:
    """The processor's peak in float32 and its memory's bandwidth, the best of five.

    Args:
        threads: 0 takes all.
    """
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((_SIDE, _SIDE), np.float32) for _ in range(2))
    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    product = np.empty_like(one)
    rows = _COPY_BYTES // 4 // _COLUMNS
    matrix, vector = np.ones((rows, _COLUMNS), np.float32, order="F"), np.ones(_COLUMNS, np.float32)
    read = np.empty(rows, np.float32)
    with threadpool_limits(threads or None):
        multiplied = _best(lambda: np.matmul(one, other, out=product))
        seen = _best(lambda: np.matmul(matrix, vector, out=read))
    copied = _best(lambda: np.copyto(target, source))
    return Device(
        flops_per_second=2 * _SIDE**3 / multiplied,
        bytes_per_second=max(
            2 * _COPY_BYTES / copied, _COPY_BYTES / seen
        ),  # a copy is read once and written once
        threads=threads,
    )


def cost_of(each: Candidate, prompt_slots: int, capacities: Sequence[int], device: Device) -> Cost:
    """What one request of a candidate costs.

    Args:
        each: with its request.
        prompt_slots: length of the longest prompt in the decoder.
        capacities: cache slots of every stage.
        device: measured.
    """
    manifest = each.bundle.manifest
    graphs, batch = manifest.graphs, len(each.input_ids_BT)
    calls = each.images.calls
    vision = [
        flops(graphs["vision"], {"batch": each.images.rows_per_call, **dims_of(graphs["vision"].spec, call)})
        for call in calls
    ]
    cached = cache_bytes(each, batch, capacities)
    slots = dict(zip(manifest.cache_layout.dims, capacities, strict=False))
    prompt, token = ("prefill", "decode") if manifest.pruning.stages else ("decoder", "decoder")
    per_slot = cached / max(capacities[0], 1)
    return Cost(
        vision=_phase(_sum(vision), len(calls) * graphs["vision"].weight_bytes, device),
        prefill=_phase(
            flops(graphs[prompt], {"batch": batch, "sequence": prompt_slots, **slots}),
            graphs[prompt].weight_bytes + round(per_slot * prompt_slots),
            device,
        ),
        decode=_phase(
            flops(graphs[token], {"batch": batch, "sequence": 1, **slots}),
            graphs[token].weight_bytes + cached,
            device,
        ),
        cache_bytes=cached,
    )


def flops(graph: Graph, dims: Mapping[str, int]) -> int | None:
    """Operations of one call; None where the bundle does not tell or names an extent that is not known here.

    Args:
        graph: with its formula.
        dims: name -> extent.
    """
    if not graph.flops or any(name not in dims for term in graph.flops for name in term.dims):
        return None
    return sum(_product(term, dims) for term in graph.flops)


def dims_of(spec: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Extents of symbolic dimensions, from arrays that are given to a graph."""
    found = {}
    for tensor in spec.inputs:
        if tensor.name in inputs:
            for dim, extent in zip(tensor.shape, inputs[tensor.name].shape, strict=True):
                if isinstance(dim, Dim):
                    found[dim.name] = int(extent)
    return found


def cache_bytes(each: Candidate, batch: int, capacities: Sequence[int]) -> int:
    """Of keys and values of all layers."""
    manifest = each.bundle.manifest
    elements = (
        2
        * manifest.spec.kv_heads
        * manifest.spec.head_dim
        * manifest.cache_layout.total_slots(capacities)
        * batch
    )
    return elements * precision(manifest.precision).activations.bytes


def _product(term: FlopTerm, dims: Mapping[str, int]) -> int:
    return term.factor * math.prod(dims[name] for name in term.dims)


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _phase(count: int | None, size: int, device: Device) -> PhaseCost:
    at_peak = 0.0 if count is None else count / device.flops_per_second
    return PhaseCost(
        flops=count,
        bytes=size,
        roofline_ms=None if count is None else 1e3 * max(at_peak, size / device.bytes_per_second),
    )


def _best(work: Any) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
