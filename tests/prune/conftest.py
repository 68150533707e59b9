"""What every strategy is put through: exported alone against the float64 reference, and inside the tiny tower."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gap_export import prune
from gap_export.graph.trace_cache import Tracer
from gap_export.positions import MergedId, PositionPolicy
from gap_export.prune import order, reference
from tests.exported import ExportedGraph, GraphExporter

BENCH = Path(__file__).resolve().parents[2] / "bench"
LARGE, MEDIUM, SMALL = (24, 24), (16, 16), (4, 5)
NO_RTX = "TensorRT-RTX is not installed: pip install 'gap-export[rtx]'"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sets() -> Any:
    """The benchmark's module of random feature sets: tests and benchmark check the same."""
    return _load("pruner_sets")


@pytest.fixture(scope="session")
def exported(sets: Any, tracer: Tracer) -> Callable[..., Any]:
    """`exported(pruner, kept, grid)`: the strategy as a graph of its own in ONNX Runtime; each made once. K is an input where
    `kept` is None."""
    made: dict[tuple[Any, ...], Any] = {}

    def graph(pruner: str, kept: int | None, grid: tuple[int, int], **options: Any) -> Any:
        key = (pruner, kept, grid, *sorted(options.items()))
        if key not in made:
            made[key] = sets.graph(pruner, kept, grid, tracer=tracer, **options)
        return made[key]

    return graph


@pytest.fixture
def check(sets: Any, exported: Callable[..., Any]) -> SimpleNamespace:
    """The checks every strategy must pass."""

    def agrees_with_float64(
        pruner: str,
        grid: tuple[int, int],
        kept: int,
        cases: int,
        seed: int = 0,
        most_ties: int | None = None,
        **options: Any,
    ) -> None:
        """At most one in ten may be excused as a tie where nothing else is said, so that ties cannot carry the test."""
        graph, generator = exported(pruner, kept, grid, **options), np.random.default_rng(seed)
        verdicts = [
            sets.agrees(graph, sets.random_features(generator, grid, **options))[0] for _ in range(cases)
        ]
        assert set(verdicts) <= {"equal", "tie"}, verdicts
        assert verdicts.count("tie") <= (cases // 10 if most_ties is None else most_ties), verdicts

    def batch_equals_singles(pruner: str) -> None:
        graph = exported(pruner, 64, MEDIUM)
        arrays = sets.random_features(np.random.default_rng(5), MEDIUM, batch=4)
        embeds, kept = graph(arrays)
        for row in range(4):
            alone_embeds, alone_kept = graph({name: array[row : row + 1] for name, array in arrays.items()})
            assert np.array_equal(alone_kept[0], kept[row])
            np.testing.assert_allclose(alone_embeds[0], embeds[row], rtol=0, atol=1e-4)

    def every_count(pruner: str, merged_id: MergedId = MergedId.LAST_VISUAL) -> None:
        """As torch code, from the fewest to all of 20 tokens, three images each: order, range, reference."""
        row, visual = prune.row(pruner), SMALL[0] * SMALL[1]
        arrays = sets.random_features(np.random.default_rng(6), SMALL, batch=3, width=48)
        features = sets.features_of({n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, SMALL)
        for kept in range(row.min_tokens, visual + 1):
            selected = prune.load(pruner).select(features, kept, seed=0, merged_id=merged_id)
            selected = order.in_decoder_order(selected, PositionPolicy.GAP)
            indices = selected.indices_BK.numpy()
            assert indices.shape == (3, kept)
            assert indices.min() >= 0
            assert indices.max() < visual
            assert (np.diff(indices, axis=1) >= (0 if row.merged else 1)).all()
            for image in range(3):
                assert len(set(indices[image])) >= kept - row.merged
                alone = sets.features_in_float64(arrays, image, SMALL)
                choice = reference.choose(pruner, alone, kept, seed=0, merged_id=merged_id)
                places = np.argsort(choice.indices_K, kind="stable")
                assert np.array_equal(indices[image], choice.indices_K[places]), kept
                if selected.patches_BKE is not None:
                    assert choice.patches_KE is not None
                    own = selected.patches_BKE[image].numpy()
                    np.testing.assert_allclose(own, choice.patches_KE[places], atol=1e-4)

    def one_graph_for_every_count(pruner: str, **options: Any) -> None:
        """As a graph in which K is an input, from the fewest to all of 20 tokens, three images each."""
        graph, generator = exported(pruner, None, SMALL, width=48, **options), np.random.default_rng(8)
        for kept in range(graph.row.min_tokens, SMALL[0] * SMALL[1] + 1):
            arrays = sets.random_features(generator, SMALL, batch=3, width=48, tower=graph.tower)
            assert set(sets.agrees(graph, arrays, kept)) == {"equal"}, kept

    def fewest_and_all(pruner: str) -> None:
        """As graphs with those counts built in, three images each."""
        for kept in (prune.row(pruner).min_tokens, SMALL[0] * SMALL[1]):
            graph = exported(pruner, kept, SMALL, width=48)
            arrays = sets.random_features(np.random.default_rng(kept), SMALL, batch=3, width=48)
            assert set(sets.agrees(graph, arrays)) == {"equal"}, kept

    return SimpleNamespace(
        agrees_with_float64=agrees_with_float64,
        batch_equals_singles=batch_equals_singles,
        every_count=every_count,
        fewest_and_all=fewest_and_all,
        one_graph_for_every_count=one_graph_for_every_count,
    )


@pytest.fixture
def vision_graph(tiny_graph: GraphExporter) -> Callable[..., ExportedGraph]:
    """`vision_graph(pruner=..., precision=..., keep=...)`: of the tiny tower, a third kept where nothing else is said."""
    return lambda **changes: tiny_graph("vision", **{"keep": 0.34, **changes})


@pytest.fixture
def builds_in_tensorrt(vision_graph: Callable[..., ExportedGraph]) -> Callable[..., None]:
    """`builds_in_tensorrt(pruner)`: TensorRT-RTX takes the tiny tower's vision graph in fp16."""
    pytest.importorskip("tensorrt_rtx", reason=NO_RTX)
    from gap_export.engine.build import engine_from_graph

    def build(pruner: str, **changes: Any) -> None:
        vision = vision_graph(pruner=pruner, precision="fp16", **changes)
        engine = engine_from_graph(
            vision.path,
            vision.graph.spec,
            target="tensorrt-rtx",
            compute_capabilities=("8.6",),
            folder=vision.path.parent,
        )
        assert (vision.path.parent / engine.file).stat().st_size > 0

    return build


@pytest.fixture
def selection_builds_in_tensorrt() -> Callable[..., None]:
    """`selection_builds_in_tensorrt(graph)`: TensorRT-RTX takes a strategy on its own in fp32; where K is an input, from the
    fewest to all."""
    rtx = pytest.importorskip("tensorrt_rtx", reason=NO_RTX)
    logger = rtx.Logger(rtx.Logger.ERROR)

    def build(graph: Any) -> None:
        builder = rtx.Builder(logger)
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = rtx.OnnxParser(network, logger)
        assert parser.parse(ir.to_proto(graph.model).SerializeToString()), parser.get_error(0).desc()
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for tensor in (network.get_input(place) for place in range(network.num_inputs)):
            if tensor.is_shape_tensor:
                fewest, visual = graph.row.min_tokens, graph.grid[0] * graph.grid[1]
                profile.set_shape_input(tensor.name, [fewest], [visual // 4], [visual])
            else:
                batches = [[batch, *tensor.shape[1:]] for batch in (1, 1, 2)]
                profile.set_shape(tensor.name, *batches)
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        engine = builder.build_serialized_network(network, config)
        assert engine is not None
        assert engine.nbytes > 0

    return build
