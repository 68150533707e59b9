"""Trains `llava-shapes` from nothing: python -m training.shapes.train --out DIR

Stage 0 trains the tower alone, stage 1 the projector and the decoder on the frozen tower, and a short stage 2 goes on
with these at a lower learning rate. No token is ever pruned in training and the position ids of an image are always
whole. A run that was stopped goes on where it was when started again with the same `--out` and `--resume`;
`DIR/checkpoint` always holds the newest weights in Hugging Face layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from training.shapes.data import ANSWER_LEN, NO_OBJECT, QUESTION_LEN, Bank, build_bank, load_bank
from training.shapes.decoder import Aids, Alone, FastDecoder
from training.shapes.loop import Average, StageConfig, run_stage
from training.shapes.losses import AidWeights, ReadOuts, decoder_loss, soft_targets
from training.shapes.model import GRID, build_model, save_checkpoint
from training.shapes.tower import TowerHeads, initialise_positions, tower_forward, tower_loss
from training.shapes.vocabulary import answer_ids, prefix_ids

QUERIES_PER_VIEW = 16  # stored per view, of which every visit draws QUERIES
QUERIES = 8
TOWER_BATCH = 64
DECODER_BATCH = 32
ALONE_SPAN = 160  # questions without an image start up to this many positions after the prefix
LATE = 0.491  # share of the decoder stage after which the late loss weights hold
PREFIX_LEN = len(prefix_ids())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--bank", type=Path, help="folder of the scene arrays, to share them between runs")
    parser.add_argument(
        "--shift", type=float, default=1.0, help="probability of shifting the tower's position table"
    )
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=3200)
    parser.add_argument("--finish-steps", type=int, default=500)
    parser.add_argument(
        "--tower", type=Path, help="take the tower of this run's tower.pt instead of training one"
    )
    for name in AidWeights.__dataclass_fields__:
        option = "--" + name.replace("_", "-")
        parser.add_argument(
            option, type=float, default=getattr(AidWeights(), name), help="weight of this aid"
        )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", choices=("tower", "decoder"), default="decoder")
    return parser.parse_args()


def draw_shift(rng: np.random.Generator, count: int, probability: float) -> torch.Tensor:
    """Shifts of the tower's position table in (rows, columns), zero for the images that are left alone: [count, 2]."""
    shift = torch.from_numpy(rng.integers(GRID, size=(count, 2)))
    if probability >= 1:
        return shift
    return shift * torch.from_numpy(rng.random((count, 1)) < probability)


def train_tower(
    model: LlavaForConditionalGeneration, bank: Bank, steps: int, seed: int, probability: float, out: Path
) -> None:
    """Stage 0; leaves the averaged weights in `model`."""
    initialise_positions(model, torch.Generator().manual_seed(seed))
    module = nn.ModuleDict({"tower": model.model.vision_tower, "heads": TowerHeads()})
    heads = module["heads"]
    assert isinstance(heads, TowerHeads)

    def step(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        views = rng.integers(bank.views, size=TOWER_BATCH)
        shift = draw_shift(rng, len(views), probability)
        states, pooled = tower_forward(model, torch.from_numpy(bank.view_pixels(views)), shift)
        assert pooled is not None
        labels = (
            torch.from_numpy(array[views]) for array in (bank.owner, bank.boxes, bank.kinds, bank.counts)
        )
        return tower_loss(heads, states, pooled, *labels)

    config = StageConfig("tower", steps, learning_rate=2e-3)
    average = run_stage(config, seed, module, step, out)
    module.load_state_dict(average.values, strict=False)


class DecoderTraining:
    """Stages 1 and 2: projector and decoder on the frozen tower."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        bank: Bank,
        seed: int,
        probability: float,
        weights: AidWeights,
        out: Path,
    ) -> None:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        self.model, self.bank, self.seed, self.probability = model, bank, seed, probability
        self.weights, self.out, self.table = weights, out, soft_targets()
        self.read_outs = ReadOuts()
        self.module = nn.ModuleDict({"model": model, "read_outs": self.read_outs})
        self.decoder = FastDecoder(model, prefix_ids(), QUESTION_LEN, ANSWER_LEN)

    def run(self, config: StageConfig, late_from: float, guess: bool) -> None:
        """One stage; leaves the averaged weights in the model.

        `late_from` is the share of the steps after which the late loss weights hold. Questions without an image are
        answered with the empty box, or, with `guess`, with the box that is right for the image that is withheld.
        """

        def step(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            return self._step(rng, number >= late_from * config.steps, guess)

        average = run_stage(config, self.seed, self.module, step, self.out, self._export)
        self.module.load_state_dict(average.values, strict=False)

    def _step(
        self, rng: np.random.Generator, late: bool, guess: bool
    ) -> tuple[torch.Tensor, dict[str, float]]:
        bank = self.bank
        views = rng.integers(bank.views, size=DECODER_BATCH)
        shift = draw_shift(rng, len(views), self.probability)
        with torch.no_grad():
            states, _ = tower_forward(
                self.model, torch.from_numpy(bank.view_pixels(views)), shift, pooled=False
            )
        chosen = rng.permuted(np.tile(np.arange(bank.turns.shape[1]), (len(views), 1)), axis=1)[:, :QUERIES]
        turns, padding, targets, answers = (
            torch.from_numpy(array[views[:, None], chosen]).long()
            for array in (bank.turns, bank.padding, bank.targets, bank.answers)
        )
        owner, boxes = torch.from_numpy(bank.owner[views]), torch.from_numpy(bank.boxes[views])
        aids = Aids(owner == NO_OBJECT, owner[:, None, :] == targets[..., None])
        start = torch.from_numpy(PREFIX_LEN + rng.integers(ALONE_SPAN, size=len(views)))
        replies = answers[:, 0] if guess else torch.tensor(answer_ids((0, 0, 0, 0))).expand(len(views), -1)
        asked = torch.cat([turns[:, 0, :QUESTION_LEN], replies[:, :-1]], dim=1)
        output = self.decoder(states[:, 1:], turns, padding, aids, Alone(asked, padding[:, 0], start))
        return decoder_loss(
            output, answers, replies, self.read_outs, owner, boxes, self.table, self.weights, late
        )

    def _export(self, average: Average) -> None:
        named = self.module.named_parameters()
        live = {name: value.detach().clone() for name, value in named if name in average.values}
        self.module.load_state_dict(average.values, strict=False)
        save_checkpoint(self.model, self.out / "checkpoint")
        self.module.load_state_dict(live, strict=False)


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    if out.exists() and any(out.glob("*.pt")) and not arguments.resume:
        raise SystemExit(
            f"{out} holds a run already: add --resume to go on with it, or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    bank_folder = arguments.bank or out / "bank"
    build_bank(bank_folder, arguments.scenes, QUERIES_PER_VIEW)
    bank = load_bank(bank_folder)
    model = build_model(arguments.seed)
    if arguments.tower is None:
        train_tower(model, bank, arguments.tower_steps, arguments.seed, arguments.shift, out)
    else:
        average = torch.load(arguments.tower / "tower.pt", weights_only=True)["average"]
        nn.ModuleDict({"tower": model.model.vision_tower}).load_state_dict(average, strict=False)
    if arguments.stop_after == "tower":
        return
    weights = AidWeights(**{name: getattr(arguments, name) for name in AidWeights.__dataclass_fields__})
    training = DecoderTraining(model, bank, arguments.seed, arguments.shift, weights, out)
    decoder = StageConfig("decoder", arguments.decoder_steps, learning_rate=1.3e-3, warmup=200)
    training.run(decoder, late_from=LATE, guess=False)
    if arguments.finish_steps:
        finish = StageConfig("finish", arguments.finish_steps, learning_rate=4e-4, warmup=30, average=0.99)
        training.run(finish, late_from=0.0, guess=True)


if __name__ == "__main__":
    main()
