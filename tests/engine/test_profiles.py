"""Profile arithmetic on random specs, and the choice of a profile for a call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle.spec import Dim, GraphSpec, TensorSpec
from gap_export.engine.profiles import Profile, Range, choose_profile, profiles_from_spec
from gap_export.errors import EngineError, SessionError


@st.composite
def dims(draw: Any, name: str, smallest: int | None = None) -> Dim:
    low = smallest or draw(st.integers(1, 40))
    optimum = draw(st.integers(low, low + 600))
    return Dim(name=name, minimum=low, optimum=optimum, maximum=draw(st.integers(optimum, optimum + 600)))


def decoder(batch: Dim, sequence: Dim, *, layers: int = 1, capacity: int | Dim = 64) -> GraphSpec:
    def tensor(name: str, dtype: Any, *shape: int | Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    past = [
        tensor(f"past.{index}.{part}", "float16", batch, 4, capacity, 16)
        for index in range(layers)
        for part in ("key", "value")
    ]
    present = [tensor(t.name.replace("past", "present"), t.dtype, *t.shape) for t in past]
    return GraphSpec(
        name="decoder",
        inputs=(
            tensor("inputs_embeds", "float16", batch, sequence, 32),
            tensor("position_ids", "int64", batch, sequence),
            tensor("write_index", "int64", batch),
            *past,
        ),
        outputs=(tensor("logits", "float32", batch, 40), *present),
        aliased={out.name: into.name for out, into in zip(present, past, strict=True)},
    )


def shapes_of(spec: GraphSpec, batch: int, sequence: int) -> dict[str, tuple[int, ...]]:
    values = {"batch": batch, "sequence": sequence}
    return {
        tensor.name: tuple(dim if isinstance(dim, int) else values[dim.name] for dim in tensor.shape)
        for tensor in spec.inputs
    }


ONE_TO_TEN = Dim(name="batch", minimum=1, optimum=1, maximum=10)
TO_THOUSAND = Dim(name="sequence", minimum=1, optimum=300, maximum=1000)


@given(dims("batch"), dims("sequence", smallest=1))
def test_every_profile_is_ordered_and_within_the_spec(batch: Dim, sequence: Dim) -> None:
    spec = decoder(batch, sequence)
    prefill, decode = profiles_from_spec(spec)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    for tensor in spec.inputs:
        for profile in (prefill, decode):
            extents = profile.ranges[tensor.name]
            for low, middle, high in zip(extents.minimum, extents.optimum, extents.maximum, strict=True):
                assert low <= middle <= high
        whole, single = prefill.ranges[tensor.name], decode.ranges[tensor.name]
        assert (whole.minimum, whole.maximum) == (tensor.extents("minimum"), tensor.extents("maximum"))
        assert whole.holds(single.minimum)
        assert whole.holds(single.maximum)
    for name in ("inputs_embeds", "position_ids"):
        single = decode.ranges[name]
        assert single.minimum[1] == single.optimum[1] == single.maximum[1] == 1


@given(dims("batch"), dims("sequence", smallest=1), st.data())
def test_a_call_within_the_spec_is_served_by_the_right_profile(batch: Dim, sequence: Dim, data: Any) -> None:
    spec = decoder(batch, sequence)
    rows = data.draw(st.integers(batch.minimum, batch.maximum))
    tokens = data.draw(st.integers(1, sequence.maximum))
    profiles = profiles_from_spec(spec)
    chosen = choose_profile(spec, profiles, shapes_of(spec, rows, tokens))
    assert profiles[chosen].holds(shapes_of(spec, rows, tokens))
    if sequence.maximum > 1:
        assert profiles[chosen].name == ("decode" if tokens == 1 else "prefill")


@given(dims("batch"), dims("sequence", smallest=1), st.booleans())
def test_a_call_outside_the_spec_is_refused(batch: Dim, sequence: Dim, too_many_rows: bool) -> None:
    spec = decoder(batch, sequence)
    rows = batch.maximum + 1 if too_many_rows else batch.minimum
    tokens = 1 if too_many_rows else sequence.maximum + 1
    with pytest.raises(SessionError) as caught:
        choose_profile(spec, profiles_from_spec(spec), shapes_of(spec, rows, tokens))
    assert caught.value.subject == "graph decoder, input inputs_embeds"
    assert str(batch.maximum if too_many_rows else sequence.maximum) in caught.value.message


def test_static_graphs_need_no_profile() -> None:
    spec = GraphSpec(
        name="vision",
        inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=(1, 3, 8, 8)),),
        outputs=(),
    )
    assert profiles_from_spec(spec) == ()
    assert choose_profile(spec, (), {"pixel_values": (1, 3, 8, 8)}) == 0
    with pytest.raises(SessionError, match="serves"):
        choose_profile(spec, (), {"pixel_values": (2, 3, 8, 8)})


def test_graphs_without_a_cache_have_one_profile() -> None:
    text = Dim(name="text", minimum=2, optimum=32, maximum=64)
    spec = GraphSpec(
        name="splice",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=(ONE_TO_TEN, text)),),
        outputs=(),
    )
    (profile,) = profiles_from_spec(spec)
    assert profile.ranges["input_ids"] == Range((1, 2), (1, 32), (10, 64))


def test_a_scalar_that_is_an_extent_has_values_in_its_profile() -> None:
    kept = Dim(name="kept", minimum=4, optimum=9, maximum=20)
    count = TensorSpec(name="keep_count", dtype="int64", shape=(), extent_of=kept)
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=(ONE_TO_TEN, 3, 8, 8))
    spec = GraphSpec(name="vision", inputs=(pixels, count), outputs=())
    (profile,) = profiles_from_spec(spec)
    assert profile.values == {"keep_count": (4, 9, 20)}
    assert profile.ranges["keep_count"] == Range((), (), ())
    assert choose_profile(spec, (profile,), {"pixel_values": (2, 3, 8, 8), "keep_count": ()}) == 0


def test_a_decoder_that_cannot_take_one_token() -> None:
    longer = Dim(name="sequence", minimum=2, optimum=8, maximum=8)
    with pytest.raises(EngineError, match="token by token") as caught:
        profiles_from_spec(decoder(ONE_TO_TEN, longer))
    assert "sequence" in caught.value.subject


def test_limits_that_contradict_each_other() -> None:
    with pytest.raises(EngineError, match="minimum <= optimum"):
        profiles_from_spec(decoder(Dim(name="batch", minimum=4, optimum=2, maximum=8), TO_THOUSAND))
    clash = GraphSpec(
        name="splice",
        inputs=tuple(
            TensorSpec(
                name=name, dtype="int64", shape=(Dim(name="batch", minimum=1, optimum=1, maximum=high),)
            )
            for name, high in (("a", 2), ("b", 3))
        ),
        outputs=(),
    )
    with pytest.raises(EngineError, match="input b") as caught:
        profiles_from_spec(clash)
    assert caught.value.subject == "graph splice, dimension batch"


def test_a_cache_may_vary_in_its_batch_only() -> None:
    slots = Dim(name="slots", minimum=8, optimum=8, maximum=64)
    with pytest.raises(EngineError, match="static cache"):
        profiles_from_spec(decoder(ONE_TO_TEN, TO_THOUSAND, capacity=slots))


def test_profiles_of_another_build_do_not_serve() -> None:
    spec = decoder(ONE_TO_TEN, TO_THOUSAND)
    shapes = shapes_of(spec, 1, 1)
    apart = tuple(
        Profile(name, {key: Range(shape, shape, shape) for key, shape in changed.items()})
        for name, changed in (
            ("a", shapes | {"write_index": (2,)}),
            ("b", shapes | {"position_ids": (1, 2)}),
        )
    )
    with pytest.raises(SessionError):
        choose_profile(spec, apart, shapes)
