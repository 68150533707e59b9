"""One training stage: steps, schedule, progress on screen, checkpoints that a killed run resumes from exactly.

All randomness of a step follows from (seed, stage, step), so a checkpoint needs no generator states: weights, optimiser
moments, running average and the step number say everything.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

CHECKPOINT_SECONDS = 150.0
LOG_EVERY = 50

StepFunction = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class StageConfig:
    """Optimiser and length of one stage; the learning rate rises over `warmup` steps and falls along a cosine."""

    name: str
    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    average: float = 0.999  # decay of the running average of the weights, which is what is exported
    floor: float = 0.01  # the learning rate ends at this fraction


@dataclass
class Average:
    """Exponential moving average of named parameters; young averages forget faster."""

    decay: float
    values: dict[str, Tensor] = field(default_factory=dict)

    def update(self, named: list[tuple[str, nn.Parameter]], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in named:
                if name not in self.values:
                    self.values[name] = value.detach().clone()
                else:
                    self.values[name].lerp_(value.detach(), 1 - decay)


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine to `floor`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * share)))


def write_atomically(path: Path, payload: object) -> None:
    """A reader, and a run that is killed half way, sees the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(payload, partial)
    os.replace(partial, path)


def run_stage(
    config: StageConfig,
    seed: int,
    module: nn.Module,
    step_function: StepFunction,
    out: Path,
    on_checkpoint: Callable[[Average], None] | None = None,
) -> Average:
    """Train the parameters of `module` that require gradients until `config.steps`; resumes from `out/<name>.pt`."""
    named = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for _, value in named if value.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [value for _, value in named if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    average, start, seconds = Average(config.average), 0, 0.0
    path = out / f"{config.name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        average.values, start, seconds = state["average"], state["step"], state["seconds"]
    began = last = time.monotonic()

    def save(step: int) -> None:
        write_atomically(
            path,
            {
                "module": dict(named),
                "optimiser": optimiser.state_dict(),
                "average": average.values,
                "step": step,
                "seconds": seconds + time.monotonic() - began,
            },
        )
        if on_checkpoint is not None:
            on_checkpoint(average)

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(config.name, total=config.steps, completed=start)
        sums: dict[str, float] = {}
        for step in range(start, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            rng = np.random.default_rng((seed, zlib.crc32(config.name.encode()), step))
            loss, metrics = step_function(step, rng)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_([value for _, value in named], config.clip)
            if not math.isfinite(norm.item()):
                console.log(f"{config.name} {step}: gradient is not finite, step left out")
                continue
            optimiser.step()
            average.update(named, step)
            for name, value in {**metrics, "norm": norm.item()}.items():
                sums[name] = sums.get(name, 0.0) + value
            if (step + 1) % LOG_EVERY == 0:
                line = " ".join(f"{name} {value / LOG_EVERY:.3f}" for name, value in sums.items())
                elapsed = seconds + time.monotonic() - began
                console.log(f"{config.name} {step + 1}/{config.steps} {elapsed:.0f}s {line}")
                sums = {}
            progress.update(task, completed=step + 1)
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                save(step + 1)
                last = time.monotonic()
    save(config.steps)
    return average
