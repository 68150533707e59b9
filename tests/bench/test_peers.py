"""Comparison with peers: which mode is whose best, what a target needs, what is recorded. Nothing is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH / "peers"))
from modes import PARTS, Mode, losses, skipped  # noqa: E402
from targets import MOST_KL, Part, Target, best_of_ours, counted, fastest, held, targets_of  # noqa: E402


def samples(**medians: tuple[float, float]) -> dict[str, Any]:
    """Of every name, eight rounds around a time to the first token and a time per token."""
    around = (0.98, 0.99, 1.0, 1.0, 1.0, 1.0, 1.01, 1.02)
    return {
        name: {"ttft_ms": [first * share for share in around], "tpot_ms": [later * share for share in around]}
        for name, (first, later) in medians.items()
    }


def ours(name: str, keep: float = 1.0, *, through_openvino: bool = False) -> Mode:
    return Mode(
        name,
        ("ours.py", str(keep), "gap", name.partition("@")[0], "onnxruntime"),
        ours=True,
        keep=keep,
        through_openvino=through_openvino,
    )


# Which mode is whose best


def test_ours_has_one_mode_for_both_quantities_the_one_with_the_shortest_answer() -> None:
    measured = samples(prompt=(100, 20), token=(200, 10), middling=(170, 12))
    assert best_of_ours(measured, measured, new_tokens=2) == "prompt"
    assert best_of_ours(measured, measured, new_tokens=32) == "token"
    assert fastest(measured, measured, "ttft_ms") == "prompt"
    assert fastest(measured, measured, "tpot_ms") == "token", "peers have one for each"


def test_a_mode_too_far_from_fp32_is_nobodys_best() -> None:
    modes = [ours("near@1.0"), ours("far@1.0"), Mode("peer", ("x.py",)), Mode("rough peer", ("x.py",))]
    measured = samples(
        **{"near@1.0": (100, 10), "far@1.0": (50, 5), "peer": (120, 12), "rough peer": (10, 1)}
    )
    kl = {"near@1.0": MOST_KL, "far@1.0": MOST_KL + 1e-6, "peer": 0.0, "rough peer": 1.0}
    assert counted(kl) == ["near@1.0", "peer"]
    found = targets_of("best", modes, kl, measured, lambda name: None, 32)
    assert {(target.ours, target.peer) for target in found} == {("near@1.0", "peer")}
    assert [target.ratio for target in found] == [1.2, 1.2]
    without = targets_of("best", modes, dict.fromkeys(kl, 0.0), measured, lambda name: None, 32)
    assert {(target.ours, target.peer) for target in without} == {("far@1.0", "rough peer")}


def test_pruning_has_to_save_most_of_the_operations_that_it_saves() -> None:
    modes = [ours("int8@1.0"), ours("int8@0.25", 0.25), ours("other@0.25", 0.25), Mode("peer", ("x.py",))]
    measured = samples(
        **{"int8@1.0": (100, 10), "int8@0.25": (50, 10), "other@0.25": (60, 20), "peer": (100, 10)}
    )
    operations = {"int8@1.0": 300, "int8@0.25": 100, "other@0.25": 1}
    kl = {mode.name: 0.0 for mode in modes}
    *whole, first, later = targets_of("best", modes, kl, measured, operations.get, 32)
    assert [target.met for target in whole] == [True, True]
    assert (first.ours, first.at_least, first.ratio, first.met) == ("int8@0.25", 2.55, 2.0, False)
    assert (later.quantity, later.at_least, later.met) == ("tpot_ms", 1.0, True)
    *_, first, _ = targets_of("best", modes, kl, measured, {**operations, "int8@1.0": 200}.get, 32)
    assert (first.at_least, first.met) == (1.7, True)
    assert [target.name for target in targets_of("fp32", modes, kl, measured, operations.get, 32)] == [
        "equal tokens, fp32",
        "equal tokens, fp32",
    ]


# What a target needs


@pytest.mark.parametrize(
    ("peer_ms", "through_openvino", "quantity", "met"),
    [
        (100, False, "ttft_ms", True),
        (99, False, "ttft_ms", False),
        (98, True, "ttft_ms", True),
        (96, True, "ttft_ms", False),
        (98, True, "tpot_ms", False),  # tokens are decoded in ONNX Runtime all the same
    ],
)
def test_a_target_is_met_at_its_ratio(
    peer_ms: float, through_openvino: bool, quantity: Any, met: bool
) -> None:
    measured = samples(ours=(100, 100), peer=(peer_ms, peer_ms))
    found = held("shown", ours("ours", through_openvino=through_openvino), "peer", quantity, measured)
    assert found.met is met, found


def test_a_target_needs_the_lower_end_of_its_interval_too() -> None:
    measured = {
        "ours": {"ttft_ms": [100.0] * 9, "tpot_ms": []},
        "peer": {"ttft_ms": [80.0] * 4 + [101.0] * 5, "tpot_ms": []},
    }
    found = held("shown", ours("ours"), "peer", "ttft_ms", measured)
    assert (found.ratio, found.low, found.met) == (1.01, 0.8, False)


# What is recorded


def test_a_record_cannot_contradict_itself() -> None:
    facts = {"name": "shown", "quantity": "ttft_ms", "ours": "a", "peer": "b", "ratio": 0.9, "low": 0.8}
    needed = {"high": 1.0, "at_least": 1.0, "low_at_least": 0.95}
    assert not Target(**facts, **needed, met=False).met
    with pytest.raises(ValidationError, match="met is True"):
        Target(**facts, **needed, met=True)
    with pytest.raises(ValidationError, match="rows"):
        Part.model_validate({"counted": [], "skipped": {}, "ratios": {}, "targets": []})


def test_names_are_unique_and_scripts_are_there() -> None:
    for modes in PARTS.values():
        assert len({mode.name for mode in modes}) == len(modes)
        assert all((BENCH / "peers" / mode.command[0]).is_file() for mode in modes)
        assert any(mode.ours for mode in modes)
        assert not all(mode.ours for mode in modes)


def test_every_mode_finds_its_loss_among_those_that_are_measured(script: Callable[[str], ModuleType]) -> None:
    measured = script("real_weights")
    record: dict[str, dict[str, Any]] = {
        "gap_export": {
            name: {"prefill": {"mean_kl": 0.01}, "steps": {"mean_kl": 0.02}} for name in measured.ROWS
        },
        "peers": {name: {"mean_kl": 0.03} for name in measured.PEERS},
    }
    found = losses(PARTS["best"], record)
    assert found["ours fp32@1.0"] == found["mobius"] == 0.0
    assert found["ours int8@0.25"] == 0.02, "the larger of one call and token by token"
    assert found["llama.cpp q8_0"] == 0.03
    assert set(losses(PARTS["fp32"], {}).values()) == {0.0}
    del record["peers"]["llama.cpp Q8_0"]
    with pytest.raises(SystemExit, match=r"no row llama.cpp Q8_0: run `python bench/real_weights.py`"):
        losses(PARTS["best"], record)


def test_without_bf16_what_needs_it_is_left_out_and_says_why() -> None:
    assert not skipped(PARTS["best"], frozenset({"avx2", "avx512_bf16"}))
    found = skipped(PARTS["best"], frozenset({"avx2"}))
    assert "transformers bf16" in found
    assert "ours int4 in openvino:bf16@1.0" in found
    assert "openvino default" not in found
    assert set(found.values()) == {"the processor has none of amx_bf16, avx512_bf16"}


def test_a_library_compiled_for_another_processor_shows() -> None:
    import environment

    info = "CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 0 | AMX_INT8 = 1 | OPENMP = 1 | REPACK = 1 |"
    assert environment.instructions_lacking(info, frozenset({"avx2", "avx512f", "amx_int8"})) == []
    assert environment.instructions_lacking(info, frozenset({"avx2", "avx512f"})) == ["AMX_INT8"]


def test_a_part_measured_before_is_kept(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same was asked on the same processor; a record without parts is of an earlier form."""
    run = script("run")
    record = json.loads((BENCH / "results" / "peers.json").read_text())
    asked = {name: record[name] for name in ("rounds", "new_tokens", "threads")}
    monkeypatch.setattr(run.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "cpu_name", lambda: record["machine"]["cpu"])
    assert run._measured_before("peers", asked) == {}
    (tmp_path / "peers.json").write_text(json.dumps(record))
    assert run._measured_before("peers", asked).keys() == record["parts"].keys()
    assert run._measured_before("peers", {**asked, "rounds": 1}) == {}
    del record["parts"]
    (tmp_path / "peers.json").write_text(json.dumps(record))
    assert run._measured_before("peers", asked) == {}
