"""The arithmetic of the latency measurement, on a session and a clock that do as they are told. Nothing here is timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.bundle.cache_layout import CacheLayout, CacheRun
from gap_export.bundle.folder import Bundle
from gap_export.bundle.manifest import ModelSpec, Pruning
from gap_export.environment import RUNTIME_PACKAGES, cpu_name, peak_rss_bytes, versions
from gap_export.errors import InputError
from gap_export.evaluation.latency.candidate import Candidate, candidate
from gap_export.evaluation.latency.measure import (
    measure,
    percentiles,
    ratio,
    time_request,
)
from gap_export.evaluation.latency.record import QUANTITIES, BenchRecord, Ratio
from gap_export.evaluation.latency.show import tables
from gap_export.inputs.batch import of_one_size
from gap_export.positions import Placement, PositionPolicy
from gap_export.runtime.session import Prefilled, Spliced, VisualTokens
from tests.recorded import Recorded

TEXT, KEPT, VISUAL, VOCABULARY = 10, 9, 36, 64
LENGTH = TEXT - 1 + KEPT
NEXT_POSITION = TEXT - 1 + VISUAL


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSession:
    """Takes exactly as long as it is told, and writes down what it was asked.

    `slowness` is called at every request and multiplies all durations of that request.
    """

    clock: FakeClock
    encode_s: float = 0.010
    splice_s: float = 0.001
    prefill_s: float = 0.020
    step_s: float = 0.002
    capacity: int = 40
    slowness: Any = None
    backend: str = "fake"
    name: str = "fake"
    journal: list[str] = field(default_factory=list)
    fed: list[tuple[int, int, int]] = field(default_factory=list)
    factor: float = 1.0

    def encode(self, pixels: Any, **_: Any) -> VisualTokens:
        self.factor = self.slowness() if self.slowness else 1.0
        self.journal.append(self.name)
        self.clock.now += self.encode_s * self.factor
        batch = len(pixels["pixel_values"])
        return VisualTokens(None, np.tile(np.arange(KEPT, dtype=np.int64), (batch, 1)))

    def splice(self, input_ids_BT: Any, visual: VisualTokens) -> Spliced:
        self.clock.now += self.splice_s * self.factor
        batch = len(input_ids_BT)
        slots = np.full(batch, LENGTH)
        ids = np.tile(np.arange(LENGTH), (batch, 1))
        return Spliced(None, Placement(ids, slots * 0, slots - 1, np.full(batch, NEXT_POSITION), slots))

    def prefill(self, embeds: Any, placement: Placement, *, reserve: int | None = None) -> Any:
        self.clock.now += self.prefill_s * self.factor
        return Prefilled(self._logits(len(placement.position_ids), 0))

    def step(self, token_ids_B: Any, placement: Placement) -> Any:
        self.clock.now += self.step_s * self.factor
        self.fed.append(
            (int(token_ids_B[0]), int(placement.position_ids[0, 0]), int(placement.write_index[0]))
        )
        return self._logits(len(token_ids_B), len(self.fed))

    def _logits(self, batch: int, winner: int) -> Any:
        logits = np.zeros((batch, VOCABULARY), np.float32)
        logits[:, winner % VOCABULARY] = 1
        return logits


def fake_candidate(session: FakeSession, name: str = "fake", batch: int = 1) -> Candidate:
    session.name = name
    manifest = SimpleNamespace(
        prompt=SimpleNamespace(images=1),
        precision="fp16",
        capacity=session.capacity,
        cache_layout=CacheLayout((CacheRun(layers=2, capacity=session.capacity),), static=True),
        spec=ModelSpec(
            hidden_size=32,
            layers=2,
            attention_heads=4,
            kv_heads=2,
            head_dim=8,
            vocabulary=VOCABULARY,
            visual_tokens=VISUAL,
            grid=(6, 6),
            max_positions=256,
        ),
        pruning=Pruning(pruner="cls_attention", keep=0.25, kept=KEPT, positions=PositionPolicy.GAP, seed=0),
    )
    bundle = Bundle(Path("nowhere"), cast(Any, manifest))
    return Candidate(
        name,
        bundle,
        session,
        of_one_size(np.zeros((batch, 3, 36, 36), np.float32), VISUAL),
        np.ones((batch, TEXT), np.int64),
    )


def ratio_of(record: BenchRecord, numerator: str, denominator: str, quantity: str) -> Ratio:
    wanted = (numerator, denominator, quantity)
    (found,) = (r for r in record.ratios if (r.numerator, r.denominator, r.quantity) == wanted)
    return found


class TestOneRequest:
    def test_readings_follow_the_stages(self) -> None:
        clock = FakeClock()
        readings = time_request(fake_candidate(FakeSession(clock)), 4, clock)
        assert np.diff(readings) == pytest.approx([0.010, 0.001, 0.020, 0.002, 0.002, 0.002])

    def test_tokens_are_fed_back_at_the_position_after_the_unpruned_prompt(self) -> None:
        clock = FakeClock()
        session = FakeSession(clock)
        time_request(fake_candidate(session), 4, clock)
        assert session.fed == [
            (0, NEXT_POSITION, LENGTH),
            (1, NEXT_POSITION + 1, LENGTH + 1),
            (2, NEXT_POSITION + 2, LENGTH + 2),
        ]

    def test_one_token_needs_no_step(self) -> None:
        clock = FakeClock()
        session = FakeSession(clock)
        assert len(time_request(fake_candidate(session), 1, clock)) == 4
        assert session.fed == []


class TestRow:
    def test_parts_and_sums(self) -> None:
        clock = FakeClock()
        record = measure(
            [fake_candidate(FakeSession(clock))], requests=5, new_tokens=6, device="test bench", clock=clock
        )
        (row,) = record.rows
        assert row.encode_ms.p50 == 10
        assert row.splice_ms.p50 == 1
        assert row.prefill_ms.p99 == 20
        assert row.ttft_ms.p50 == 31
        assert row.tpot_ms.p50 == 2
        assert row.total_ms.p50 == 31 + 5 * 2
        assert record.device == "test bench"
        assert record.ratios == ()

    def test_time_per_token_leaves_the_first_out(self) -> None:
        clock = FakeClock()
        session = FakeSession(clock, prefill_s=9.0)
        (row,) = measure([fake_candidate(session)], requests=2, new_tokens=3, clock=clock).rows
        assert row.tpot_ms.p50 == 2

    def test_one_token_has_no_time_per_token(self) -> None:
        clock = FakeClock()
        pair = [fake_candidate(FakeSession(clock), name) for name in "AB"]
        record = measure(pair, requests=2, new_tokens=1, clock=clock)
        assert record.rows[0].tpot_ms.p50 == 0
        assert "tpot_ms" not in {each.quantity for each in record.ratios}

    def test_sizes(self) -> None:
        clock = FakeClock()
        each = fake_candidate(FakeSession(clock, capacity=40), batch=3)
        (row,) = measure([each], requests=1, new_tokens=2, clock=clock).rows
        assert (row.batch, row.kept, row.visual_tokens, row.positions) == (3, KEPT, VISUAL, "gap")
        assert (row.prompt_slots, row.capacity) == (LENGTH, 40)
        assert (
            row.cache_bytes == 2 * 2 * 2 * 8 * 40 * 3 * 2
        )  # K and V, layers, heads, width, slots, batch, fp16

    def test_warm_up_is_not_measured(self) -> None:
        clock = FakeClock()
        slow_start = iter([50.0] * 4 + [1.0] * 6)
        session = FakeSession(clock, slowness=lambda: next(slow_start))
        (row,) = measure([fake_candidate(session)], requests=6, warmup=4, new_tokens=2, clock=clock).rows
        assert row.ttft_ms.p99 == 31


class TestRounds:
    def test_everyone_answers_once_per_round(self) -> None:
        clock = FakeClock()
        sessions = [FakeSession(clock) for _ in range(3)]
        journal: list[str] = []
        for session in sessions:
            session.journal = journal
        ticks: list[int] = []
        recorded = Recorded(lambda told: ticks.append(len(journal)) if told.counts else None)
        measure(
            [fake_candidate(session, name) for session, name in zip(sessions, "ABC", strict=True)],
            requests=40,
            warmup=2,
            new_tokens=1,
            clock=clock,
            progress=recorded,
        )
        rounds = [tuple(journal[start : start + 3]) for start in range(0, len(journal), 3)]
        assert ticks == list(range(3, 3 * 42 + 1, 3))
        assert recorded.totals == [len(ticks)]
        assert all(sorted(each) == ["A", "B", "C"] for each in rounds)
        assert len(set(rounds)) == 6, "every order occurs, so that nobody always follows the same other"

    def test_order_is_the_same_in_every_run(self) -> None:
        journals: list[list[str]] = []
        for _ in range(2):
            clock = FakeClock()
            journals.append([])
            pair = [FakeSession(clock, journal=journals[-1]) for _ in range(2)]
            measure(
                [fake_candidate(session, name) for session, name in zip(pair, "AB", strict=True)],
                requests=20,
                new_tokens=1,
                clock=clock,
            )
        assert journals[0] == journals[1]

    def test_drift_that_both_suffer_leaves_the_ratio_alone(self) -> None:
        """The machine gets slower all the time; one bundle stays a tenth slower than the other."""
        clock = FakeClock()
        began = clock.now

        def drift() -> float:
            return float(1 + (clock.now - began))

        fast = FakeSession(clock, slowness=drift)
        slow = FakeSession(
            clock, encode_s=0.011, splice_s=0.0011, prefill_s=0.022, step_s=0.0022, slowness=drift
        )
        record = measure(
            [fake_candidate(slow, "slow"), fake_candidate(fast, "fast")],
            requests=60,
            new_tokens=4,
            clock=clock,
        )
        assert record.rows[0].total_ms.p99 > 5 * record.rows[0].total_ms.p50
        assert ratio_of(record, "slow", "fast", "total_ms").ratio == pytest.approx(1.1, abs=0.05)

    def test_record_survives_json_and_prints(self) -> None:
        clock = FakeClock()
        pair = [fake_candidate(FakeSession(clock), "A"), fake_candidate(FakeSession(clock), "B")]
        record = measure(pair, requests=3, new_tokens=2, clock=clock)
        assert BenchRecord.model_validate_json(record.model_dump_json()) == record
        assert [len(table.rows) for table in tables(record)] == [2 + len(QUANTITIES), len(QUANTITIES)]
        assert len(tables(measure(pair[:1], requests=3, new_tokens=2, clock=clock))) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("requests", "new_tokens", "warmup"), [(0, 4, 0), (1, 0, 0), (1, 1, -1)], ids=str
    )
    def test_nothing_to_measure(self, requests: int, new_tokens: int, warmup: int) -> None:
        with pytest.raises(InputError):
            measure(
                [fake_candidate(FakeSession(FakeClock()))],
                requests=requests,
                new_tokens=new_tokens,
                warmup=warmup,
            )

    def test_no_candidate(self) -> None:
        with pytest.raises(InputError):
            measure([], requests=1, new_tokens=1)

    def test_one_name_twice(self) -> None:
        clock = FakeClock()
        twins = [fake_candidate(FakeSession(clock), "A"), fake_candidate(FakeSession(clock), "A")]
        with pytest.raises(InputError, match="not distinct"):
            measure(twins, requests=1, new_tokens=1, clock=clock)

    def test_cache_is_filled_to_the_last_slot_and_no_further(self) -> None:
        clock = FakeClock()
        each = fake_candidate(FakeSession(clock, capacity=40))
        fitting = 40 - LENGTH + 1  # the last token generated takes no slot
        measure([each], requests=1, new_tokens=fitting, warmup=0, clock=clock)
        with pytest.raises(InputError, match="needs 41 cache slots"):
            measure([each], requests=1, new_tokens=fitting + 1, clock=clock)


class TestArithmetic:
    def test_percentiles(self) -> None:
        found = percentiles(np.arange(101, dtype=np.float64))
        assert (found.p50, found.p90, found.p99) == (50, 90, 99)

    @given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60))
    def test_percentiles_are_ordered_and_within_the_samples(self, samples: list[float]) -> None:
        found = percentiles(np.array(samples))
        assert min(samples) - 1e-4 <= found.p50 <= found.p90 <= found.p99 <= max(samples) + 1e-4

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.floats(1, 1e4), min_size=1, max_size=40), st.floats(0.2, 5))
    def test_exact_multiple_has_an_exact_ratio(self, samples: list[float], factor: float) -> None:
        """Rounds are resampled in pairs: whatever the noise, a constant factor leaves no spread."""
        found = ratio("A", "B", "total_ms", np.array(samples) * factor, np.array(samples))
        assert (found.ratio, found.low, found.high) == pytest.approx((factor,) * 3, abs=1e-4)

    def test_interval_holds_the_ratio_and_shows_noise(self) -> None:
        random = np.random.default_rng(5)
        one, other = random.gamma(20, 1, 200), random.gamma(20, 1, 200)
        found = ratio("A", "B", "total_ms", one, other)
        assert found.low < found.ratio < found.high
        assert found.high - found.low > 0.02

    def test_pairing_matters(self) -> None:
        """Negative control: the same samples in another order of rounds have a wide interval."""
        drift = np.linspace(1, 10, 100)
        paired = ratio("A", "B", "total_ms", drift * 1.1, drift)
        unpaired = ratio("A", "B", "total_ms", drift * 1.1, drift[np.random.default_rng(0).permutation(100)])
        assert paired.high - paired.low < 1e-3
        assert unpaired.high - unpaired.low > 0.1

    def test_ratio_is_the_same_in_every_run(self) -> None:
        random = np.random.default_rng(6)
        samples = random.gamma(20, 1, 50), random.gamma(20, 1, 50)
        assert ratio("A", "B", "total_ms", *samples) == ratio("A", "B", "total_ms", *samples)


class TestMachine:
    def test_peak_memory_counts_what_was_given_back(self) -> None:
        before = peak_rss_bytes()
        assert before is not None
        np.ones(60 * 2**20, np.uint8).sum()
        after = peak_rss_bytes()
        assert after is not None
        assert after >= before
        assert after > 60 * 2**20

    def test_names(self) -> None:
        assert cpu_name()
        assert versions(("numpy", "no-such-package")).keys() == {"python", "numpy"}
        assert "onnxruntime" in versions(RUNTIME_PACKAGES)


def test_real_bundle_answers(tiny_bundle: Any) -> None:
    """The stand-in request is one that the bundle's graphs accept."""
    from gap_export.runtime.ort import OnnxRuntimeSession

    bundle = tiny_bundle()
    each = candidate("tiny", bundle, OnnxRuntimeSession(bundle, threads=1), batch=2)
    assert each.input_ids_BT.shape[0] == len(each.images.visual_tokens) == 2
    record = measure([each], requests=2, warmup=1, new_tokens=bundle.manifest.max_new_tokens)
    assert record.rows[0].kept == bundle.manifest.pruning.kept
    assert 0 < record.rows[0].ttft_ms.p50 < record.rows[0].total_ms.p50
