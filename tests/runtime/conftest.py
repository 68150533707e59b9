"""A small bundle for tests of runtimes: four graphs without weights, made in milliseconds, with every tensor of a real one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle.folder import Bundle, open_bundle, write_manifest
from gap_export.bundle.hashes import record_of
from gap_export.bundle.manifest import BoxFormat, Engine, EngineTarget, Graph, Manifest, ModelSpec, Pruning
from gap_export.bundle.spec import Dim, DType, GraphSpec, TensorSpec
from gap_export.errors import SessionError
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import PromptTemplate
from gap_export.positions import PositionPolicy
from gap_export.recipe.recipe import Recipe
from gap_export.runtime.session import Session

N, K, H, CAPACITY, MAX_TEXT, MAX_BATCH = 6, 3, 8, 16, 8, 2
IMAGE_TOKEN = 7

# Token 1 of every prompt is the placeholder; embeddings are sines, so that the graphs need no weights.
GRAPHS = {
    "vision": """
        vision (float[batch, 3, 4, 4] pixel_values) => (float[batch, 3, 8] visual_embeds, int64[batch, 3] kept_indices)
        <int64[3] tokens_shape = {0, 6, 8}, int64[1] two = {2}, int64[1] three = {3}, int64[3] wide = {1, 1, 8}>
        {
            tokens = Reshape (pixel_values, tokens_shape)
            score = ReduceMean <keepdims = 0> (tokens, two)
            best, loose = TopK <axis = 1> (score, three)
            kept_indices, rank = TopK <axis = 1, largest = 0> (loose, three)
            index = Unsqueeze (kept_indices, two)
            index_wide = Expand (index, wide)
            visual_embeds = GatherElements <axis = 1> (tokens, index_wide)
        }""",
    "splice": """
        splice (int64[batch, text] input_ids, float[batch, 3, 8] visual_embeds, int64[batch, 3] kept_indices)
            => (float[batch, spliced, 8] inputs_embeds, int64[batch, spliced] position_ids,
                int64[batch] next_position, int64[batch] next_slot)
        <float[8] frequency = {0.1, 0.3, 0.5, 0.7, 1.1, 1.3, 1.7, 1.9}, int64[1] zero = {0}, int64[1] one = {1},
         int64[1] two = {2}, int64[1] end = {100}, int64 first = {0}, int64 step = {1},
         int64 seven = {7}, int64[1] five = {5}>
        {
            real = GreaterOrEqual (input_ids, zero)
            counts = Cast <to = 7> (real)
            tokens = ReduceSum <keepdims = 0> (counts, one)
            next_slot = Add (tokens, two)
            next_position = Add (tokens, five)
            floats = Cast <to = 1> (input_ids)
            column = Unsqueeze (floats, two)
            angles = Mul (column, frequency)
            embeds = Sin (angles)
            before = Slice (embeds, zero, one, one)
            after = Slice (embeds, two, end, one)
            inputs_embeds = Concat <axis = 1> (before, visual_embeds, after)
            ids_before = Slice (input_ids, zero, one, one)
            position_before = Mul (ids_before, zero)
            position_image = Add (kept_indices, one)
            ids_after = Slice (input_ids, two, end, one)
            shape_after = Shape (ids_after)
            count_after = Gather <axis = 0> (shape_after, step)
            steps = Range (first, count_after, step)
            nothing = Mul (ids_after, zero)
            shifted = Add (steps, seven)
            position_after = Add (nothing, shifted)
            position_ids = Concat <axis = 1> (position_before, position_image, position_after)
        }""",
    "embed": """
        embed (int64[batch, text] input_ids) => (float[batch, text, 8] inputs_embeds)
        <float[8] frequency = {0.1, 0.3, 0.5, 0.7, 1.1, 1.3, 1.7, 1.9}, int64[1] two = {2}>
        {
            floats = Cast <to = 1> (input_ids)
            column = Unsqueeze (floats, two)
            angles = Mul (column, frequency)
            inputs_embeds = Sin (angles)
        }""",
    "decoder": """
        decoder (float[batch, sequence, 8] inputs_embeds, int64[batch, sequence] position_ids, int64[batch] write_index,
                 int64[batch] last_index, float[batch, 1, 16, 8] past_0_key, float[batch, 1, 16, 8] past_0_value)
            => (float[batch, 8] logits, float[batch, 1, 16, 8] present_0_key, float[batch, 1, 16, 8] present_0_value)
        <float[8] frequency = {1.9, 0.1, 1.7, 0.3, 1.3, 0.5, 1.1, 0.7}, float scale = {8.0}, int64[1] one = {1},
         int64[1] two = {2}, int64 first = {0}, int64 step = {1},
         int64[1, 1, 16] slots = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, int64[3] wide = {1, 1, 8}>
        {
            floats = Cast <to = 1> (position_ids)
            column = Unsqueeze (floats, two)
            angles = Mul (column, frequency)
            turned = Cos (angles)
            placed = Mul (inputs_embeds, turned)
            key = Unsqueeze (placed, one)
            value = Unsqueeze (inputs_embeds, one)
            present_0_key = TensorScatter <axis = 2, mode = "linear"> (past_0_key, key, write_index)
            present_0_value = TensorScatter <axis = 2, mode = "linear"> (past_0_value, value, write_index)
            shape = Shape (position_ids)
            length = Gather <axis = 0> (shape, step)
            steps = Range (first, length, step)
            base = Unsqueeze (write_index, one)
            query_slots = Add (base, steps)
            query_column = Unsqueeze (query_slots, two)
            visible = LessOrEqual (slots, query_column)
            mask = Unsqueeze (visible, one)
            attended = Attention <is_causal = 0> (key, present_0_key, present_0_value, mask)
            hidden = Squeeze (attended, one)
            last = Unsqueeze (last_index, one)
            last_column = Unsqueeze (last, two)
            index = Expand (last_column, wide)
            row = GatherElements <axis = 1> (hidden, index)
            flat = Squeeze (row, one)
            logits = Mul (flat, scale)
        }""",
}  # fmt: skip

BATCH = Dim(name="batch", minimum=1, optimum=1, maximum=MAX_BATCH)
SYMBOLS = {
    "batch": BATCH,
    "text": Dim(name="text", minimum=2, optimum=MAX_TEXT, maximum=MAX_TEXT),
    "spliced": Dim(name="spliced", minimum=K + 1, optimum=MAX_TEXT - 1 + K, maximum=MAX_TEXT - 1 + K),
    "sequence": Dim(name="sequence", minimum=1, optimum=MAX_TEXT - 1 + K, maximum=MAX_TEXT - 1 + K),
}
ELEMENT_TYPES: dict[int, DType] = {1: "float32", 7: "int64"}  # onnx.TensorProto.FLOAT and .INT64


def spec_of(name: str, model: Any) -> GraphSpec:
    symbols = SYMBOLS | (
        {"text": Dim(name="text", minimum=1, optimum=1, maximum=MAX_TEXT)} if name == "embed" else {}
    )

    def tensor(value: Any) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(symbols[d.dim_param] if d.dim_param else d.dim_value for d in kind.shape.dim)
        return TensorSpec(name=value.name, dtype=ELEMENT_TYPES[kind.elem_type], shape=shape)

    outputs = tuple(tensor(value) for value in model.graph.output)
    aliased = {out.name: out.name.replace("present", "past") for out in outputs if "present" in out.name}
    return GraphSpec(
        name=name,
        inputs=tuple(tensor(value) for value in model.graph.input),
        outputs=outputs,
        aliased=aliased,
    )


def write_bundle(folder: Path, engines: dict[EngineTarget, dict[str, Engine]] | None = None) -> Bundle:
    import onnx
    import onnx.parser

    graphs = {}
    for name, text in GRAPHS.items():
        model = onnx.parser.parse_model('<ir_version: 11, opset_import: ["" : 24]>' + text)
        _rename(model.graph)
        onnx.save(model, folder / f"{name}.onnx")
        graphs[name] = Graph(file=f"{name}.onnx", spec=spec_of(name, model), operators={})
    (folder / "tokenizer.json").write_text("{}")  # nothing reads it
    engines = engines or {}
    built = {engine.file: name for of_target in engines.values() for name, engine in of_target.items()}
    for file, name in built.items():
        if not (folder / file).exists():  # the stand-in for an engine runs its graph
            shutil.copy(folder / f"{name}.onnx", folder / file)
    names = [*(f"{name}.onnx" for name in GRAPHS), "tokenizer.json", *built]
    manifest = Manifest(
        gap_export="0",
        name="small",
        family="small",
        checkpoint="none",
        precision="fp32",
        spec=ModelSpec(
            hidden_size=H,
            layers=1,
            attention_heads=1,
            kv_heads=1,
            head_dim=H,
            vocabulary=H,
            visual_tokens=N,
            grid=(2, 3),
            max_positions=64,
        ),
        pruning=Pruning(pruner="norm", keep=0.5, kept=K, positions=PositionPolicy.GAP, seed=0),
        capacity=CAPACITY,
        max_new_tokens=4,
        layout=SquareLayout(
            size=4, fit="pad", background=(0, 0, 0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        ),
        prompt=PromptTemplate(
            grounding="{expression}", image_token_id=IMAGE_TOKEN, add_special_tokens=False, eos_token_ids=()
        ),
        box=BoxFormat(codec="llava", frame="image"),
        graphs=graphs,
        recipe=Recipe(
            name="small",
            checkpoint="none",
            pruner="norm",
            keep=0.5,
            max_text=MAX_TEXT,
            max_batch=MAX_BATCH,
            max_new_tokens=4,
            capacity=CAPACITY,
            targets=("onnx", *engines),
        ),
        engines=engines,
        files={name: record_of(folder / name) for name in names},
    )
    write_manifest(folder, manifest)
    return open_bundle(folder)


def _rename(graph: Any) -> None:
    """ONNX's text form has no dots in names."""

    def dotted(name: str) -> str:
        return name.replace("past_0_", "past.0.").replace("present_0_", "present.0.")

    for value in (*graph.input, *graph.output):
        value.name = dotted(value.name)
    for node in graph.node:
        node.input[:] = [dotted(name) for name in node.input]
        node.output[:] = [dotted(name) for name in node.output]


@pytest.fixture
def write_small_bundle() -> Callable[..., Bundle]:
    """`write_small_bundle(folder, engines={})` -> opened bundle. Skips where onnx is not installed."""
    pytest.importorskip("onnx", reason="the small bundle is made with onnx")
    return write_bundle


CALLS: dict[str, Callable[[Session], Any]] = {
    "encode": lambda session: session.encode({"pixel_values": np.zeros((1, 3, 36, 36), np.float32)}),
    "embeds_together": lambda session: session.embeds_together([], 0),
    "splice": lambda session: session.splice(*[None] * 2),  # type: ignore[arg-type]
    "prefill": lambda session: session.prefill(*[None] * 2),  # type: ignore[arg-type]
    "fork": lambda session: session.fork(2),
    "extend": lambda session: session.extend(np.zeros((1, 1), np.int64), None),  # type: ignore[arg-type]
    "step": lambda session: session.step(np.zeros(1, np.int64), None),  # type: ignore[arg-type]
    "clear": lambda session: session.clear([1]),
    "grow": lambda session: session.grow([1]),
    "embed": lambda session: session.embed(np.zeros((1, 1), np.int64)),
    "append": lambda session: session.append(*[None] * 2),  # type: ignore[arg-type]
    "with": lambda session: session.__enter__(),
}


def _check_closed(session: Session) -> None:
    session.close()
    session.close()  # does nothing
    for name, call in CALLS.items():
        with pytest.raises(SessionError, match="is closed") as caught:
            call(session)
        assert session.backend in caught.value.subject, name


@pytest.fixture
def check_closed() -> Callable[[Session], None]:
    """`check_closed(session)` closes it, twice, and sees every later call refused."""
    return _check_closed
