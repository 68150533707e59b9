"""A stage that is killed and started again ends with the very weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from training.shapes import loop  # noqa: E402


class _Killed(Exception):
    """Stands for the end of the process."""


def _stage(out: Path, kill_at: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    module = torch.nn.Linear(4, 3)

    def step(number: int, rng):  # type: ignore[no-untyped-def]
        if number == kill_at:
            raise _Killed
        x = torch.from_numpy(rng.standard_normal((8, 4))).float()
        loss = (module(x) - x[:, :3]).square().mean()
        return loss, {"loss": loss.item()}

    out.mkdir(exist_ok=True)
    config = loop.StageConfig("stage", steps=9, learning_rate=0.05, warmup=2)
    return loop.run_stage(config, seed, module, step, out).values


def test_resumed_run_is_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = _stage(tmp_path / "whole")
    with pytest.raises(_Killed):
        _stage(tmp_path / "broken", kill_at=5)
    resumed = _stage(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    first, second = _stage(tmp_path / "a"), _stage(tmp_path / "b", seed=1)
    assert not torch.equal(first["weight"], second["weight"])


def test_learning_rate_rises_and_falls() -> None:
    config = loop.StageConfig("stage", steps=100, learning_rate=1.0, warmup=10)
    rates = [loop.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02


def test_checkpoint_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    loop.write_atomically(path, {"step": 1})
    with pytest.raises(AttributeError):
        loop.write_atomically(path, {"step": lambda: None})
    assert torch.load(path, weights_only=True) == {"step": 1}
