"""A trained decoder, asked through exported graphs: what it says, whether transformers says the same, and what asking costs.

    python bench/asking.py [--new-tokens 300] [--rounds 9] [--scratch FOLDER] [--label TEXT]

SmolLM2-135M-Instruct as `real_weights.py` makes it, behind a tower with random weights, with the chat template of its own tokenizer beside
it; bundle in fp32, ONNX Runtime. Questions without an image are the decoder's alone, so the reference is that decoder in transformers, fp32,
on the same token ids: the first question is encoded by `apply_chat_template`, later ones continue the ids that were answered. Greedy. Two
implementations may choose differently where two logits are nearly equal: every token of an answer is also read by the reference behind all tokens before
it, and its logit may lie at most 1e-4 below the largest. Times are of calls in turns, in one session, two threads; ratios of the same round, then their
median. The last line printed is the record, also stored in bench/results/asking.json. Needs the environment of `peers/environment.py`
for the weights, and 3 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
import real_weights

import gap_export as gap
from gap_export.boxes.scenes import cases
from gap_export.inputs.chat.renderer import Renderer

FACT, EXPECTED = "What is the capital of France?", "Paris"
LONG = "Write a long story about a lighthouse keeper and the sea. Describe every day of one week."
TURNS = (
    "Name three fruits.",
    "Which of them is yellow?",
    "Write one sentence about the first one.",
)
TIMED = "Explain in detail how bread is made."
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TIE = 1e-4
"""Of logits, the largest of which are near 40."""
TIMED_TOKENS = 64
MOST_ASK, MOST_STREAM = 1.1, 1.05
"""Time per token: of `ask` as a share of `ground`'s, and of a stream as a share of an answer as a whole."""


def main() -> int:
    parser = harness.parser_of(__doc__, scratch=True)
    parser.add_argument("--new-tokens", type=int, default=300, help="of the long answer")
    parser.add_argument("--rounds", type=int, default=9, help="of timed calls, in turns")
    options = parser.parse_args()
    console = Console()
    options.scratch.mkdir(parents=True, exist_ok=True)
    decoder, facts = real_weights.ensure_decoder(options.scratch)
    checkpoint = ensure_chat(options.scratch, decoder, real_weights.ensure_llava(options.scratch, decoder))
    console.print("building")
    bundle = build(options.scratch / "bundle-chat", checkpoint)
    fact = said_by_command(bundle.folder)
    console.print(f"{FACT}\n  {fact}")
    reference = Reference(decoder)
    with gap.load(bundle, threads=2) as model:
        console.print("reading the long answer and three turns")
        long = conversation(model, reference, [LONG], options.new_tokens)
        turns = conversation(model, reference, TURNS, options.new_tokens)
        del reference  # times are measured without it in memory
        console.print("timing")
        ratios = times(model, options.rounds)
    print_table(console, long, turns, ratios)
    targets = {
        "tokens that the reference does not choose": (sum(row["wrong"] for row in (*long, *turns)), 0),
        "time per token, ask / ground": (ratios["ask / ground"]["median"], MOST_ASK),
        "time of an answer, streamed / as a whole": (ratios["streamed / as a whole"]["median"], MOST_STREAM),
    }
    for name, (measured, limit) in targets.items():
        console.print(f"{name}: {measured:.3f}, at most {limit:g}")
    ok = EXPECTED in fact and all(measured <= limit for measured, limit in targets.values())
    return harness.finish(
        "asking",
        {
            "checkpoint": facts,
            "chat": bundle.manifest.chat.model_dump(exclude={"variables"}),
            "fact": {"question": FACT, "text": fact, "says": EXPECTED, "ok": EXPECTED in fact},
            "tie": TIE,
            "long_answer": long,
            "three_turns": turns,
            "times": ratios,
            "targets": {name: {"measured": m, "at_most": limit} for name, (m, limit) in targets.items()},
        },
        label=options.label,
        ok=ok,
    )


def ensure_chat(scratch: Path, decoder: Path, llava: Path) -> Path:
    """The checkpoint of `real_weights.py` with the chat template and the special tokens of the decoder's own tokenizer."""
    if not (decoder / TEMPLATE).exists():
        raise SystemExit(f"{decoder} has no {TEMPLATE}: remove it, and it is made again")
    folder = scratch / "smollm2-llava-chat"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = {TEMPLATE, TOKENIZER_CONFIG}
    for file in llava.iterdir():
        if file.name not in own:
            os.link(file, folder / file.name)
    for name in own:
        shutil.copy(decoder / name, folder)
    return folder


def build(folder: Path, checkpoint: Path) -> Any:
    recipe = gap.Recipe.load(
        "llava",
        checkpoint=str(checkpoint),
        precision="fp32",
        keep=0.25,
        pruner="cls_attention",
        max_text=2048,
        max_new_tokens=512,
        prompt=as_grounding_prompt((checkpoint / TEMPLATE).read_text()),
    )
    return gap.build(recipe, folder, replace=True, golden=False)


def as_grounding_prompt(template: str) -> str:
    """What a free question about one image is written as: with it `ground` reads the tokens that `ask` reads."""
    with Renderer(template) as renderer:
        return renderer.render([{"role": "user", "content": "<image>\n{expression}"}])


def said_by_command(folder: Path) -> str:
    """What `gap-export ask` prints."""
    command = [sys.executable, "-m", "gap_export", "ask", str(folder), "--no-image", FACT]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


class Reference:
    """The decoder alone, in transformers."""

    def __init__(self, decoder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM

        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(decoder)

    def rendered(self, messages: list[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def generated(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """What `generate` says, the end token left out."""
        given = self._torch.tensor([list(ids)])
        with self._torch.inference_mode():
            out = self._model.generate(
                given,
                attention_mask=self._torch.ones_like(given),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=self._tokenizer.eos_token_id,
            )
        found: list[int] = out[0, len(ids) :].tolist()
        return found[:-1] if found and found[-1] == self._tokenizer.eos_token_id else found

    def margins(self, ids: Sequence[int], answer: Sequence[int], *, ended: bool) -> Any:
        """[T] of every token of an answer: how far its logit lies below the largest, behind all tokens before it.

        Args:
            ids: of the prompt.
            answer: ids, without an end token.
            ended: whether the model ended it: its end token is one more of T then.
        """
        tokens = [*answer, *([self._tokenizer.eos_token_id] if ended else [])]
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
        chosen = logits[range(len(tokens)), tokens]
        return (logits.max(dim=-1).values - chosen).numpy()


def conversation(
    model: Any, reference: Any, questions: Sequence[str], new_tokens: int
) -> list[dict[str, Any]]:
    """Questions one after the other, and what the reference says of each answer."""
    chat, rows = model.chat(), []
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    rendered = ""
    for question in questions:
        reply = chat.ask(question, max_new_tokens=new_tokens)
        messages.append({"role": "user", "content": question})
        whole = reference.rendered(messages)
        ids += reference.ids(added(whole, rendered))
        row = compared(
            reply.ids,
            reference.generated(ids, new_tokens),
            reference.margins(ids, reply.ids, ended=reply.finish_reason == "stop"),
        )
        rows.append(
            {
                "question": question,
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "prompt_tokens_of_reference": len(ids),
                "encoded_anew_the_same": reference.ids(whole) == ids,
                **row,
            }
        )
        if reply.prompt_tokens != len(ids):
            raise SystemExit(
                f"{question}: the prompt has {reply.prompt_tokens} tokens, the reference {len(ids)}"
            )
        messages.append({"role": "assistant", "content": reply.text})
        ids += reply.ids
        rendered = whole + reply.text
    return rows


def added(whole: str, before: str) -> str:
    """What a template wrote behind the conversation so far, its last answer included.

    Raises:
        SystemExit: it wrote the conversation so far otherwise than before.
    """
    if not whole.startswith(before):
        raise SystemExit("the template rewrites what was said")
    return whole.removeprefix(before)


def compared(answer: Sequence[int], generated: Sequence[int], margins: Any) -> dict[str, Any]:
    """An answer beside what transformers generates from the same prompt, and beside what it would choose behind every token.

    Args:
        answer: ids.
        generated: ids of transformers.
        margins: [T] float32 of `Reference.margins`.
    """
    differ = (
        number for number, (mine, theirs) in enumerate(zip(answer, generated, strict=False)) if mine != theirs
    )
    same = next(differ, min(len(answer), len(generated)))
    return {
        "tokens": len(answer),
        "tokens_of_generate": len(generated),
        "first_tokens_the_same": same,
        "whole_the_same": list(answer) == list(generated),
        "near_ties": int(np.sum((margins > 0) & (margins <= TIE))),
        "wrong": int(np.sum(margins > TIE)),
        "largest_margin": float(np.max(margins, initial=0.0)),
    }


def times(model: Any, rounds: int) -> dict[str, Any]:
    """Ratios of times per token, of calls in turns.

    `ask` and `ground` are given the same image and the same words in the same prompt, and make the same tokens; their time is that of the loop alone, neither
    of the image nor of the prompt. A stream is compared with a whole answer, both from the call on, without an image.
    """
    (case,) = cases(1)
    calls: dict[str, Callable[[], tuple[float, Any]]] = {
        "ground": lambda: loop_of_ground(model, case.image),
        "ask": lambda: loop_of_ask(model, case.image),
        "as a whole": lambda: timed(lambda: model.ask(TIMED, max_new_tokens=TIMED_TOKENS)),
        "streamed": lambda: timed(lambda: streamed(model)),
    }
    answers = {name: call()[1] for name, call in calls.items()}  # the first call of each is not timed
    for one, other in (("ask", "ground"), ("streamed", "as a whole")):
        if answers[one].text.strip() != answers[other].text.strip():  # that of `ground` is stripped
            raise SystemExit(f"{one} and {other} gave two answers: their times say nothing")
        if answers[one].new_tokens != TIMED_TOKENS:
            raise SystemExit(f"{one} gave {answers[one].new_tokens} tokens of {TIMED_TOKENS}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, names = np.random.default_rng(0), list(calls)
    for _ in range(rounds):
        for number in order.permutation(len(names)):
            spent, _ = calls[names[number]]()
            seconds[names[number]].append(spent / (TIMED_TOKENS - 1))
    return {
        "rounds": rounds,
        "new_tokens": TIMED_TOKENS,
        "milliseconds_per_token": {
            name: 1e3 * statistics.median(seconds[name]) for name in ("ground", "ask")
        },
        "ask / ground": spread(seconds["ask"], seconds["ground"]),
        "streamed / as a whole": spread(seconds["streamed"], seconds["as a whole"]),
    }


def loop_of_ground(model: Any, image: Any) -> tuple[float, Any]:
    """(seconds of all tokens after the first, the answer)."""
    answer = model.ground(image, TIMED, max_new_tokens=TIMED_TOKENS)
    return answer.timings.decode, answer


def loop_of_ask(model: Any, image: Any) -> tuple[float, Any]:
    """(seconds of all tokens after the first, choice and text included, the answer)."""
    stream = model.stream(TIMED, image, max_new_tokens=TIMED_TOKENS)
    seconds, reply = timed(lambda: stream.reply)
    return seconds - reply.timings.vision - reply.timings.prefill, reply


def streamed(model: Any) -> Any:
    """An answer, read piece by piece."""
    stream = model.stream(TIMED, max_new_tokens=TIMED_TOKENS)
    for _ in stream:
        continue
    return stream.reply


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of a call, what it gave)."""
    began = time.perf_counter()
    given = call()
    return time.perf_counter() - began, given


def spread(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Ratios of the same round: their median, the smallest and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}


def print_table(
    console: Console, long: list[dict[str, Any]], turns: list[dict[str, Any]], ratios: dict[str, Any]
) -> None:
    table = Table("question", "tokens", "generate", "the same", "near-ties", "wrong", "largest margin")
    for row in (*long, *turns):
        table.add_row(
            row["question"][:40],
            str(row["tokens"]),
            str(row["tokens_of_generate"]),
            str(row["first_tokens_the_same"]),
            str(row["near_ties"]),
            str(row["wrong"]),
            f"{row['largest_margin']:.1e}",
        )
    console.print(table)
    table = Table("time per token", "median", "smallest", "largest")
    for name in ("ask / ground", "streamed / as a whole"):
        table.add_row(name, *(f"{ratios[name][part]:.3f}" for part in ("median", "smallest", "largest")))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
