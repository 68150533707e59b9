"""Small decoder graphs for the lint tests, written in ONNX's text form: one good one, and parts to replace.

Two layers, batch B, S tokens of width 32, 2 query heads, 1 key head of 16, a cache of 12 slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

WIDTH, HEAD, CAPACITY, VOCABULARY = 32, 16, 12, 20

ANGLES = {
    "ids": "ids_BS = Cast <to=1> (position_ids)",
    "none": "",
    "range": "counted = Range (zero, length, one) ids_S = Cast <to=1> (counted) ids_BS = Unsqueeze (ids_S, ax0)",
    "cumsum": "seen = CumSum (attention_mask, one) ids_BS = Cast <to=1> (seen)",
    "first": """first = Slice (position_ids, at0, at1, ax1) counted = Range (zero, length, one)
        start = Add (first, counted) ids_BS = Cast <to=1> (start)""",
    "relative": "least = ReduceMin <keepdims=1> (position_ids, ax1) rel = Sub (position_ids, least) ids_BS = Cast <to=1> (rel)",
    "clamped": "held = Min (position_ids, capacity) ids_BS = Cast <to=1> (held)",
    "rounded": "coarse = Cast <to=16> (position_ids) ids_BS = Cast <to=1> (coarse)",
    "shape": "like = Shape (position_ids) ids_2 = Cast <to=1> (like) ids_1 = Slice (ids_2, at1, at2) ids_BS = Unsqueeze (ids_1, ax0)",
    "running": "seen = CumSum (position_ids, one) ids_BS = Cast <to=1> (seen)",
    "summed": """counted = Range (zero, length, one) both = Add (position_ids, counted)
        ids_BS = Cast <to=1> (both)""",
}
ROWS = """ids_BS1 = Unsqueeze (ids_BS, ax2) freqs = Mul (ids_BS1, inv_freq) angle = Concat <axis=-1> (freqs, freqs)
    cos3 = Cos (angle) sin3 = Sin (angle) cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""
HALF_ROWS = """ids_BS1 = Unsqueeze (ids_BS, ax2) freqs = Mul (ids_BS1, inv_freq) cos3 = Cos (freqs) sin3 = Sin (freqs)
    cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""
TABLE_ROWS = """ids_int = Cast <to=7> (ids_BS) cos3 = Gather (cos_table, ids_int) sin3 = Gather (sin_table, ids_int)
    cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""
CALLER_ROWS = """cos3 = Slice (rope_rotary_cos_sin, at0, at16, ax2) sin3 = Slice (rope_rotary_cos_sin, at16, at32, ax2)
    cos = Unsqueeze (cos3, ax1) sin = Unsqueeze (sin3, ax1)"""

TOKEN_ROWS = (
    HALF_ROWS
    + """ cos_rows = Reshape (cos3, rows_shape) sin_rows = Reshape (sin3, rows_shape)
    rows_B = Shape <start=0, end=1> (inputs_embeds) every_1 = Mul (rows_B, extent) every = Squeeze (every_1)
    counted_N = Range (zero, every, one) grid = Concat <axis=0> (rows_B, extent) places = Reshape (counted_N, grid)"""
)
"""Each token's own cosines and sines are the table, and its rows are picked by counting: how transformers' exporter fuses."""

ROTATE = {
    "half": """{x}_a = Slice ({x}, at0, at8, ax3) {x}_b = Slice ({x}, at8, at16, ax3) {x}_n = Neg ({x}_b)
        {x}_h = Concat <axis=-1> ({x}_n, {x}_a) {x}_c = Mul ({x}, cos) {x}_s = Mul ({x}_h, sin) {x}_r = Add ({x}_c, {x}_s)""",
    "apart": """{x}_a, {x}_b = Split <axis=-1, num_outputs=2> ({x})
        {x}_ac = Mul ({x}_a, cos) {x}_bs = Mul ({x}_b, sin) {x}_bc = Mul (cos, {x}_b) {x}_as = Mul (sin, {x}_a)
        {x}_1 = Sub ({x}_ac, {x}_bs) {x}_2 = Add ({x}_bc, {x}_as) {x}_r = Concat <axis=-1> ({x}_1, {x}_2)""",
    "interleaved": """{x}_e = Slice ({x}, at0, at16, ax3, by2) {x}_o = Slice ({x}, at1, at16, ax3, by2) {x}_n = Neg ({x}_o)
        {x}_u = Unsqueeze ({x}_n, ax4) {x}_v = Unsqueeze ({x}_e, ax4) {x}_w = Concat <axis=-1> ({x}_u, {x}_v)
        {x}_h = Reshape ({x}_w, heads_shape) {x}_c = Mul ({x}, cos) {x}_s = Mul ({x}_h, sin) {x}_r = Add ({x}_c, {x}_s)""",
    "matrix": """{x}_h = MatMul ({x}, rotation) {x}_c = Mul ({x}, cos) {x}_s = Mul ({x}_h, sin) {x}_r = Add ({x}_c, {x}_s)""",
    "operator": "{x}_r = RotaryEmbedding ({x}, cos3, sin3)",
    "operator-ids": "{x}_r = RotaryEmbedding ({x}, cos_half, sin_half, ids_int)",
    "microsoft": "{x}_r = com.microsoft.RotaryEmbedding ({x}, ids_int, cos_half, sin_half)",
    "microsoft-rows": "{x}_r = com.microsoft.RotaryEmbedding ({x}, places, cos_rows, sin_rows)",
    "operator-rows": "{x}_r = RotaryEmbedding ({x}, cos_rows, sin_rows, places)",
    "none": "{x}_r = Identity ({x})",
}
MASK = """row_Q = Range (zero, length, one) start_B1 = Unsqueeze (write_index, ax1) last_BQ = Add (start_B1, row_Q)
    last_BQ1 = Unsqueeze (last_BQ, ax2) seen_BQC = LessOrEqual (slots, last_BQ1) mask = Unsqueeze (seen_BQC, ax1)"""
PACKED_MASK = """before_a = Slice (position_ids, at0, at1, ax1) before_b = Slice (position_ids, at0, end, ax1)
    before = Concat <axis=1> (before_a, before_b) step = Sub (position_ids, before) gap = Greater (step, one)
    gap_i = Cast <to=7> (gap) segment = CumSum (gap_i, one) row = Unsqueeze (segment, ax2) column = Unsqueeze (segment, ax1)
    same = Equal (row, column) mask = Unsqueeze (same, ax1)"""
SCATTER = """present.{l}.key = TensorScatter <axis=2> (past.{l}.key, k{l}_r, write_index)
    present.{l}.value = TensorScatter <axis=2> (past.{l}.value, v{l}, write_index)"""
GROW = """present.{l}.key = Concat <axis=2> (past.{l}.key, k{l}_r)
    present.{l}.value = Concat <axis=2> (past.{l}.value, v{l})"""
NO_CACHE = "present.{l}.key = Identity (k{l}_r) present.{l}.value = Identity (v{l})"
ATTENTION = "a{l} = Attention <is_causal=0> (q{l}_r, present.{l}.key, present.{l}.value, mask)"
DECOMPOSED = """kt{l}_g = Concat <axis=1> (present.{l}.key, present.{l}.key) both{l} = Concat <axis=1> (present.{l}.value, present.{l}.value)
    kt{l} = Transpose <perm=[0,1,3,2]> (kt{l}_g) score{l} = MatMul (q{l}_r, kt{l}) scaled{l} = Mul (score{l}, scale)
    masked{l} = Where (mask, scaled{l}, minus) weights{l} = Softmax <axis=-1> (masked{l}) a{l} = MatMul (weights{l}, both{l})"""

LENGTHS = """length_32 = Cast <to=6> (length) one_32 = Cast <to=6> (one) before_32 = Sub (length_32, one_32)
    rows_1 = Shape <start=0, end=1> (inputs_embeds) lengths = Expand (before_32, rows_1) total = Identity (length_32)"""
ROTATES_INSIDE = """a{l}_f, present.{l}.key, present.{l}.value = com.microsoft.GroupQueryAttention
    <num_heads=2, kv_num_heads=1, do_rotary=1> (qp{l}, kp{l}, vp{l}, , , lengths, total, %s)
    a{l}_s = Reshape (a{l}_f, split_q) a{l} = Transpose <perm=[0,2,1,3]> (a{l}_s)"""

INPUTS = {
    "inputs_embeds": "float[B,S,32] inputs_embeds",
    "position_ids": "int64[B,S] position_ids",
    "attention_mask": "int64[B,S] attention_mask",
    "write_index": "int64[B] write_index",
    "last_index": "int64[B] last_index",
}


@dataclass
class Small:
    """The parts of a small decoder; replace one to break one rule.

    Attributes:
        angles: how `ids_BS` comes about.
        rows: from there to cosines and sines.
        rotate: how `{x}_r` comes from `{x}`, for queries and keys.
        mask: how `mask` comes about.
        cache: how present comes from past in layer `{l}`.
        attention: how `a{l}` comes from all that.
        second: parts that differ in the second layer.
        inputs: names of the baseline inputs, or declarations.
        past: type of the caches that come in.
        present: type of the caches that go out.
        opset: of the standard domain.
        layers: how many.
        extra: more text ahead of the layers.
    """

    angles: str = ANGLES["ids"]
    rows: str = ROWS
    rotate: str = ROTATE["half"]
    mask: str = MASK
    cache: str = SCATTER
    attention: str = ATTENTION
    second: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("inputs_embeds", "position_ids", "write_index", "last_index")
    past: str = "float[B,1,12,16]"
    present: str = "float[B,1,12,16]"
    opset: int = 24
    layers: int = 2
    extra: str = ""

    def text(self) -> str:
        declared = [INPUTS.get(name, name) for name in self.inputs]
        if "past." in self.cache or "past." in self.attention:
            declared += [
                f"{self.past} past.{layer}.{kind}"
                for layer in range(self.layers)
                for kind in ("key", "value")
            ]
        outputs = ["float[B,20] logits"]
        outputs += [
            f"{self.present} present.{layer}.{kind}"
            for layer in range(self.layers)
            for kind in ("key", "value")
        ]
        layers = "\n".join(self._layer(layer) for layer in range(self.layers))
        pick = f"last_B1 = Unsqueeze (last_index, ax1) last_BH = GatherND <batch_dims=1> (h{self.layers}, last_B1)"
        if "last_index" not in self.inputs:
            pick = f"last_BH = ReduceMax <keepdims=0> (h{self.layers}, ax1)"
        return f"""<ir_version: 10, opset_import: ["" : {self.opset}, "com.microsoft" : 1, "plugin" : 1]>
        small ({", ".join(declared)}) => ({", ".join(outputs)}) {{
            extent = Shape <start=1, end=2> (inputs_embeds) length = Squeeze (extent)
            {self.angles} {self.rows} {self.mask} {self.extra}
            h0 = Identity (inputs_embeds)
            {layers}
            {pick}
            logits = MatMul (last_BH, w_out)
        }}"""

    def _layer(self, layer: int) -> str:
        rotate = self.second.get("rotate", self.rotate) if layer else self.rotate
        cache = self.second.get("cache", self.cache) if layer else self.cache
        attention = self.second.get("attention", self.attention) if layer else self.attention
        return f"""
        qp{layer} = MatMul (h{layer}, wq{layer}) kp{layer} = MatMul (h{layer}, wk{layer}) vp{layer} = MatMul (h{layer}, wv{layer})
        qs{layer} = Reshape (qp{layer}, split_q) ks{layer} = Reshape (kp{layer}, split_k) vs{layer} = Reshape (vp{layer}, split_k)
        q{layer} = Transpose <perm=[0,2,1,3]> (qs{layer}) k{layer} = Transpose <perm=[0,2,1,3]> (ks{layer})
        v{layer} = Transpose <perm=[0,2,1,3]> (vs{layer})
        {rotate.format(x=f"q{layer}")} {rotate.format(x=f"k{layer}")}
        {cache.format(l=layer)}
        {attention.format(l=layer)}
        t{layer} = Transpose <perm=[0,2,1,3]> (a{layer}) f{layer} = Reshape (t{layer}, join) o{layer} = MatMul (f{layer}, wo{layer})
        h{layer + 1} = Add (h{layer}, o{layer})"""

    def proto(self, edit: Callable[[str], str] = str) -> onnx.ModelProto:
        """The model, with random weights; unused constants left out."""
        # The text form knows no dots in names.
        text = re.sub(r"\b(past|present)\.(\d+)\.(\w+)", r"\1__\2__\3", edit(self.text()))
        model = onnx.parser.parse_model(text)
        used = _dotted(model.graph)
        for name, content in constants(self.layers).items():
            if name in used:
                model.graph.initializer.append(onnx.numpy_helper.from_array(content, name))
        return model

    def model(self) -> ir.Model:
        """The model in memory."""
        return ir.from_proto(self.proto())


def _dotted(graph: onnx.GraphProto) -> set[str]:
    """Put the dots back into names, bodies included; gives all names that are read."""
    used: set[str] = set()
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace("__", ".")
    for node in graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
        node.output[:] = [name.replace("__", ".") for name in node.output]
        used.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                used |= _dotted(attribute.g)
    return used


def constants(layers: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    frequencies = np.float32(100.0) ** (-np.arange(HEAD // 2, dtype=np.float32) / (HEAD // 2))
    table = np.arange(64, dtype=np.float32)[:, None] * np.concatenate([frequencies, frequencies])
    eye = np.eye(HEAD // 2, dtype=np.float32)
    zero = np.zeros_like(eye)
    constants: dict[str, np.ndarray] = {
        "inv_freq": frequencies[None, None],
        "cos_table": np.cos(table),
        "sin_table": np.sin(table),
        "cos_half": np.cos(table[:, : HEAD // 2]),
        "sin_half": np.sin(table[:, : HEAD // 2]),
        "rotation": np.block([[zero, eye], [-eye, zero]]).astype(np.float32),
        "scale": np.float32(HEAD**-0.5) * np.ones(1, np.float32),
        "minus": np.float32(-1e9) * np.ones(1, np.float32),
        "slots": np.arange(CAPACITY)[None, None],
        "capacity": np.array(CAPACITY),
        "seven": np.array(7),
        "three": np.array([1, 1, 3]),
        "three_times": np.array(3),
        "at0_3": np.array([0, 3]),
        "slots_64": np.arange(5000),
        "far": np.array([-(1 << 40)]),
        "zero": np.array(0),
        "one": np.array(1),
        "end": np.array([-1]),
        "by2": np.array([2]),
        "rows_shape": np.array([-1, HEAD // 2]),
        "split_q": np.array([0, 0, 2, HEAD]),
        "split_k": np.array([0, 0, 1, HEAD]),
        "heads_shape": np.array([0, 0, 0, HEAD]),
        "join": np.array([0, 0, WIDTH]),
        "baked_cos": np.cos(table[None, None, :5]),
        "baked_sin": np.sin(table[None, None, :5]),
        "position_table": draw.normal(size=(64, WIDTH)).astype(np.float32),
        "join_k": np.array([0, 0, HEAD]),
        "w_out": draw.normal(size=(WIDTH, VOCABULARY)).astype(np.float32) * 0.5,
        **{f"ax{axis}": np.array([axis]) for axis in range(5)},
        **{f"at{place}": np.array([place]) for place in (0, 1, 2, 8, 16, 32)},
    }
    for layer in range(layers):
        for name, columns in (("q", WIDTH), ("k", HEAD), ("v", HEAD), ("o", WIDTH)):
            weight = draw.normal(size=(WIDTH, columns)).astype(np.float32) * 0.5
            constants[f"w{name}{layer}"] = weight
    return constants


def inside(operands: str, batch: str = "1", **changes: object) -> Small:
    """A prompt whose grouped-query attention rotates by itself: tables and, if any, what picks their rows."""
    baseline: dict[str, object] = {
        "rows": TOKEN_ROWS,
        "rotate": ROTATE["none"],
        "mask": LENGTHS,
        "cache": "",
        "attention": ROTATES_INSIDE % operands,
        "present": f"float[{batch},1,S,16]",
        "inputs": (
            f"float[{batch},S,32] inputs_embeds",
            f"int64[{batch},S] position_ids",
            f"int64[{batch}] last_index",
        ),
    }
    return Small(**{**baseline, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def parts() -> SimpleNamespace:
    """Everything above, for tests: pytest does not let test files import each other."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
