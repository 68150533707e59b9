"""Products of few bits: graphs against NumPy and PyTorch, what they are made of, and engines that take them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import Graph
from gap_export.errors import RecipeError, SessionError
from gap_export.graph.quantize import int4, nvfp4
from gap_export.graph.quantize.rounding import E4M3_MAX
from gap_export.graph.quantize.scheme import Weight, load_scheme
from gap_export.graph.quantize.store import FILE
from gap_export.inputs.batch import of_one_size
from gap_export.pipeline.graphs import export_graphs
from gap_export.plan import plan_for
from gap_export.precision import FP32, PRECISIONS
from gap_export.recipe.ranges import Ranges, read_ranges
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.backends import open_session
from gap_export.runtime.generate import Generation, generate
from gap_export.runtime.torch.reference import open_torch

PROMPT = [1, 5, 6, 4, 7, 8, 9]


@pytest.fixture
def decoder(
    tiny_options: dict[str, Any], deep_checkpoint: Path, tracer: Any, tmp_path: Path
) -> Callable[..., tuple[Path, Graph]]:
    """`decoder(precision)` -> (file, what the manifest would say of it): the decoder alone, of heads that engines have kernels for."""
    layers = [
        f"language_model.layers.{layer}.{part}_proj.weight"
        for layer in range(4)
        for part in (
            *(f"self_attn.{each}" for each in "qkvo"),
            *(f"mlp.{each}" for each in ("gate", "up", "down")),
        )
    ]
    measured = Ranges(
        gap_export="0", bundle="deep", family="llava", checkpoint="deep", samples=1, source="made up", largest=dict.fromkeys(layers, 8.0)
    )  # fmt: skip

    def exported(precision: str) -> tuple[Path, Graph]:
        options = {**tiny_options, "checkpoint": str(deep_checkpoint), "keep": 0.25, "capacity": 80}
        if PRECISIONS[precision].needs_ranges:
            (tmp_path / "measured.json").write_text(measured.model_dump_json())
            options["ranges"] = str(tmp_path / "measured.json")
        recipe = Recipe.model_validate({**options, "precision": precision})
        graph = export_graphs(recipe, tmp_path, only={"decoder"}, tracer=tracer).graphs["decoder"]
        return tmp_path / graph.file, graph

    return exported


def answered(bundle: Bundle, session: Any, **options: Any) -> Generation:
    ids = np.array([PROMPT, [*PROMPT[:-2], -1, -1]], np.int64)
    pixels = np.random.default_rng(1).standard_normal((2, 3, 36, 36), np.float32)
    return generate(
        session, of_one_size(pixels, 36), ids, max_new_tokens=5, eos_token_ids=(), keep_logits=True, **options
    )


@pytest.mark.parametrize("precision", ["int8", "int8-blocks", "int4", "int4-fp16", "fp8"])
def test_it_computes_nearly_the_same(low: Callable[[str], Bundle], precision: str) -> None:
    """A tiny model with sharp random attention forgives little: its prompt's logits still point the same way."""
    bundle = low(precision)
    mine = answered(bundle, open_session(bundle, "onnxruntime", threads=1))
    theirs = answered(bundle, open_torch(bundle))
    a, b = mine.logits[0].ravel(), theirs.logits[0].ravel()
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > (0.85 if precision.startswith("int4") else 0.97)
    assert mine.placement.position_ids.dtype == np.int64


@pytest.mark.parametrize("precision", ["int8", "int8-blocks", "int4", "int4-fp16"])
def test_restored_weights_give_the_graphs_own_logits(
    low: Callable[[str], Bundle], precision: str, tiny_checkpoint: Path
) -> None:
    """What is in the file, multiplied out by NumPy, is nearest to the checkpoint's weights."""
    kinds = ("int8", "int4", "uint4")
    stored = {
        name: value.const_value.numpy()
        for name, value in ir.load(low(precision).graph_path("decoder")).graph.initializers.items()
        if value.const_value is not None
        and name.endswith((*(f".{kind}" for kind in kinds), ".scale", ".zero"))
    }
    checkpoint = load_file(tiny_checkpoint / "model.safetensors")
    found = [
        name for name in stored if name.endswith(tuple(f".{kind}" for kind in kinds)) and "lm" not in name
    ]
    assert len(found) == 2 * 7, "two layers of seven"
    heads = [name for name in stored if name.startswith("lm_head")]
    assert heads == ([] if precision == "int4-fp16" else ["lm_head.weight.int8", "lm_head.weight.scale"])
    expected = {"int8": "int8", "int8-blocks": "int8", "int4": "uint4", "int4-fp16": "int4"}[precision]
    for name in [*found, *heads[:1]]:
        parameter, _, kind = name.rpartition(".")
        numbers, scales = stored[name].astype(np.float32), stored[f"{parameter}.scale"].astype(np.float32)
        zeros = stored.get(f"{parameter}.zero", np.zeros_like(scales)).astype(np.float32)
        if scales.ndim == 2:
            scales, zeros = (np.repeat(each, int4.BLOCK, axis=0) for each in (scales, zeros))
        inner = parameter.removeprefix("language_model.").removeprefix("layers.")
        (weight,) = (
            w.T for key, w in checkpoint.items() if "language_model" in key and key.endswith(f".{inner}")
        )
        error = np.abs((numbers - zeros) * scales - weight).mean() / np.abs(weight).mean()
        # What is wider than what it reads has seven bits of weights in int8, the head excepted.
        seven = precision == "int8" and weight.shape[1] > weight.shape[0] and name not in heads
        limit = {"int8": 0.02 if seven else 0.01, "uint4": 0.1, "int4": 0.12}[kind]
        assert error < limit, "a step of eight bits, of seven, of four"
        assert kind == ("int8" if parameter.endswith("lm_head.weight") else expected)


def in_order(graph: onnx.GraphProto) -> bool:
    """Whether every node comes after those whose outputs it reads, as ONNX demands. (ONNX Runtime sorts for itself.)"""
    written = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        if not written.issuperset(node.input):
            return False
        written.update(node.output)
    return True


def test_only_standard_operators_and_no_float_weights_left(low: Callable[[str], Bundle]) -> None:
    int8, blocks, int4 = (low(precision).manifest.graphs for precision in ("int8", "int8-blocks", "int4"))
    one_piece = 2 * 2  # of the feed-forward, what is wider than what it reads
    assert int8["decoder"].operators["MatMulInteger"] == one_piece + 2 * (15 - one_piece)
    assert int8["vision"].operators["MatMulInteger"] > 10
    assert blocks["decoder"].operators["DequantizeLinear"] >= 14
    assert blocks["vision"].operators["DequantizeLinear"] > 10
    assert "MatMulInteger" not in blocks["vision"].operators
    assert "MatMulInteger" not in int4["vision"].operators
    for graphs in (blocks, int4):
        assert graphs["decoder"].operators["MatMulInteger"] == 2, "the head, in two pieces"
        assert graphs["decoder"].operators["DequantizeLinear"] == 14 + 1, "and the first of these pieces"
    for name in ("int8", "int8-blocks", "int4"):
        for graph in ("decoder", "vision", "splice", "embed"):
            model = onnx.load(low(name).graph_path(graph), load_external_data=False)
            assert in_order(model.graph)
            assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
            quantisers = {"DynamicQuantizeLinear", "QuantizeLinear"}
            assert {node.op_type for node in model.graph.node} & quantisers <= {"QuantizeLinear"}, (
                "one scale per call makes a row depend on its neighbours"
            )


def test_what_one_layer_reads_is_quantised_once(low: Callable[[str], Bundle]) -> None:
    """Three projections share one quantisation, gate and up another; in the last layer queries read one row, keys and values all."""
    graphs = low("int8").manifest.graphs
    readings = 4 + 5 + 1  # of the first layer; of the last, where the row is chosen; the head's
    assert graphs["decoder"].operators["QuantizeLinear"] == 2 * readings - 2, (
        "two pieces each, but for gate and up"
    )
    assert graphs["decoder"].operators["ReduceMax"] == readings


def test_the_decoder_reads_fewer_bytes(
    low: Callable[[str], Bundle], tiny_bundle: Callable[..., Bundle]
) -> None:
    whole, int8, blocks, int4 = (
        bundle.manifest.graphs["decoder"]
        for bundle in (tiny_bundle(), low("int8"), low("int8-blocks"), low("int4"))
    )
    for eight_bits in (int8, blocks):
        assert int4.weight_bytes < eight_bits.weight_bytes < 0.4 * whole.weight_bytes

    def flops(graph: Graph) -> int:
        return sum(term.factor for term in graph.flops)

    # Products in two pieces are two products: all but those of gate and up, or the head alone.
    width, inner, vocabulary = 32, 64, 64
    head = 2 * width * vocabulary
    one_piece = 2 * (2 * 2 * width * inner)
    attention = sum(term.factor for term in whole.flops if "capacity" in term.dims)
    assert flops(blocks) == flops(int4) == flops(whole) + head
    assert flops(int8) == 2 * (flops(whole) - attention) - one_piece + attention


def test_the_file_is_a_safetensors_file(low: Callable[[str], Bundle]) -> None:
    from safetensors import safe_open

    path = low("int4").folder / FILE
    with safe_open(path, "np") as stored:
        names = [name for name in stored.keys() if not name.startswith("alignment.")]  # noqa: SIM118  (not a dict)
        assert stored.get_tensor(next(name for name in names if name.endswith(".int8"))).dtype == np.int8
    layers, head = 2 * 7, 1
    assert len(names) == 3 * layers + 2 * head, "numbers, scales and zero points; the head has none of these"
    assert sum(name.endswith(".scale") for name in names) == layers + head
    assert low("int4").manifest.files[FILE].bytes == path.stat().st_size


def test_gapped_ids_still_count(low: Callable[[str], Bundle]) -> None:
    """The same bundle with ids shifted by one after the image answers otherwise."""
    bundle = low("int8")
    session = open_session(bundle, "onnxruntime", threads=1)

    def shifted(placement: Any, visual: Any) -> Any:
        from dataclasses import replace

        ids = placement.position_ids.copy()
        ids[:, 3:12] = np.arange(3, 12)
        return replace(placement, position_ids=ids)

    right, wrong = answered(bundle, session), answered(bundle, session, adjust=shifted)
    assert np.abs(right.logits[0] - wrong.logits[0]).max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int8-blocks", "int4"])
def test_no_engines(tiny_options: dict[str, Any], tiny_bundle: Callable[..., Bundle], precision: str) -> None:
    recipe = Recipe.model_validate(
        {**tiny_options, "precision": precision, "targets": ["onnx", "tensorrt-rtx"]}
    )
    with pytest.raises(RecipeError, match="runs in ONNX Runtime, not in tensorrt-rtx"):
        plan_for(recipe, tiny_bundle().manifest.spec)


@pytest.mark.slow
def test_engines_take_four_bits_in_half_precision(
    decoder: Callable[..., tuple[Path, Graph]], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    from gap_export.engine.build import engine_from_graph

    path, graph = decoder("int4-fp16")
    model = onnx.load(path, load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    scales = {kind for name, kind in kinds.items() if name.endswith(".scale")}
    assert scales == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.INT4 in kinds.values()
    assert kinds["lm_head.weight"] == onnx.TensorProto.FLOAT16
    assert not {"MatMulInteger", "DynamicQuantizeLinear"} & {node.op_type for node in model.graph.node}
    engine_from_graph(
        path,
        graph.spec,
        target="tensorrt-rtx",
        compute_capabilities=("8.6",),
        folder=tmp_path,
    )


def test_eight_bit_floats_are_scaled_by_what_was_measured(low: Callable[[str], Bundle], ranges: Path) -> None:
    """Activations once for all that read them, by the largest of their ranges, weights column by column; the head and the tower stay in half precision."""
    bundle = low("fp8")
    graph = ir.load(bundle.graph_path("decoder")).graph
    largest = read_ranges(ranges).largest
    seen = 0
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[1].producer().op_type != "DequantizeLinear":
            continue
        numbers, scale = node.inputs[1].producer().inputs
        back = node.inputs[0].producer()
        step = back.inputs[1].const_value.numpy()
        together = [
            largest[product.inputs[1].producer().inputs[0].name.removesuffix(".fp8")]
            for product in back.outputs[0].consumers()
        ]
        assert step == np.float16(max(together) / E4M3_MAX)
        assert back.inputs[0].producer().inputs[1].const_value.numpy() == step
        assert numbers.dtype == ir.DataType.FLOAT8E4M3FN
        assert scale.shape == [numbers.shape[1]]
        seen += 1
    operators = bundle.manifest.graphs["decoder"].operators
    assert seen == 2 * 7
    assert operators["QuantizeLinear"] == 2 * 4
    assert graph.initializers["lm_head.weight"].dtype == ir.DataType.FLOAT16
    assert "QuantizeLinear" not in bundle.manifest.graphs["vision"].operators


def test_four_bit_floats_have_two_scales(
    tiny_options: dict[str, Any], ranges: Path, tracer: Any, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({**tiny_options, "precision": "nvfp4", "ranges": str(ranges)})
    export_graphs(recipe, tmp_path, only={"decoder"}, tracer=tracer)
    graph = ir.load(tmp_path / "decoder.onnx").graph
    largest = read_ranges(ranges).largest
    kinds = {name: value.dtype for name, value in graph.initializers.items()}
    weights = [name for name, kind in kinds.items() if kind == ir.DataType.FLOAT4E2M1]
    assert len(weights) == 2 * 7
    for name in weights:
        parameter = name.removesuffix(".fp4")
        inner, columns = graph.initializers[name].shape
        assert kinds[f"{parameter}.scale"] == ir.DataType.FLOAT8E4M3FN
        assert graph.initializers[f"{parameter}.scale"].shape == [inner // nvfp4.BLOCK, columns]
        assert kinds[f"{parameter}.global_scale"] == ir.DataType.FLOAT
    (steps,) = ({float(n.inputs[1].const_value.numpy()) for n in graph if n.domain == "trt"},)
    assert steps <= {np.float32(number / (6 * E4M3_MAX)) for number in largest.values()}
    assert "lm_head.weight" in kinds


@pytest.mark.parametrize(("precision", "capability"), [("fp8", "8.9"), ("nvfp4", "12.0")])
def test_engines_take_floats_of_few_bits(
    decoder: Callable[..., tuple[Path, Graph]], tmp_path: Path, precision: str, capability: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'gap-export[rtx]'")
    from gap_export.engine.build import engine_from_graph

    path, graph = decoder(precision)
    engine_from_graph(
        path,
        graph.spec,
        target="tensorrt-rtx",
        compute_capabilities=(capability,),
        folder=tmp_path,
    )


def test_four_bit_floats_run_on_no_cpu(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle()
    four_bits = Bundle(bundle.folder, bundle.manifest.model_copy(update={"precision": "nvfp4"}))
    with pytest.raises(SessionError, match="nvfp4 graphs have no CPU kernels"):
        open_session(four_bits, "onnxruntime", threads=1)


@pytest.mark.parametrize(("precision", "old"), [("fp8", ("8.6",)), ("nvfp4", ("8.9",))])
def test_gpus_that_do_not_know_such_numbers(
    tiny_options: dict[str, Any],
    tiny_bundle: Callable[..., Bundle],
    ranges: Path,
    precision: str,
    old: tuple[str, ...],
) -> None:
    options = {
        **tiny_options,
        "precision": precision,
        "ranges": str(ranges),
        "targets": ["onnx", "tensorrt-rtx"],
    }
    facts = tiny_bundle().manifest.spec
    plan_for(Recipe.model_validate(options), facts)
    with pytest.raises(RecipeError, match=f"not known to GPUs of compute capability {old[0]}"):
        plan_for(Recipe.model_validate({**options, "compute_capabilities": (*old, "12.0")}), facts)


def test_half_precision_checkpoints_are_read_as_they_are(
    tiny_options: dict[str, Any], tiny_checkpoint: Path, tracer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "model.safetensors"
    half = {key: value.astype(np.float16) for key, value in load_file(file).items()}
    save_file(half, file, {"format": "pt"})
    recipe = Recipe.model_validate({**tiny_options, "checkpoint": str(folder), "precision": "int8"})
    (tmp_path / "out").mkdir()
    written = export_graphs(recipe, tmp_path / "out", only={"decoder"}, tracer=tracer)
    assert (tmp_path / "out" / "weights-fp32.safetensors").is_file()
    assert written.weight_bytes > (tmp_path / "out" / FILE).stat().st_size
    stored = load_file(tmp_path / "out" / FILE)
    found = [key.removesuffix(".int8") for key in stored if key.endswith(".int8")]
    assert len(found) == 2 * 7 + 1
    assert {key.rpartition(".")[0] for key in stored} == set(found)
    for key in found:
        rows = half[key].astype(np.float32)
        columns, inner = rows.shape
        wide = columns > inner and not key.endswith("lm_head.weight")
        weight = Weight(columns, inner, FP32, lambda: 0.0)
        scheme = load_scheme("int8" if wide else "int8_fine")
        for piece, part in zip(scheme.pieces(weight), scheme.encode(rows, weight), strict=True):
            np.testing.assert_array_equal(stored[f"{key}.{piece.name}"], part.T)
        assert (f"{key}.sum" in stored) == wide
