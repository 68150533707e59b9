"""Drive a bundle with ONNX Runtime, NumPy, Pillow and tokenizers alone: what docs/positions.md says, as a program.

python docs/drive_a_bundle.py BUNDLE IMAGE "the small red circle"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, image, expression = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
manifest = json.loads((folder / "manifest.json").read_text())
sizes, prompt, fit = manifest["spec"], manifest["prompt"], manifest["layout"]
graph = {
    name: ort.InferenceSession(str(folder / entry["file"])) for name, entry in manifest["graphs"].items()
}
if "decoder" not in graph:
    sys.exit("this bundle drops tokens inside the decoder: see the section on stages in docs/positions.md")
if (fit["kind"], fit.get("fit")) != ("square", "pad"):
    sys.exit(
        "this bundle does not pad images to a square: docs/positions.md says which inputs it takes besides"
    )
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

# The image: padded to a square, resized, scaled, normalised.
image = Image.open(image).convert("RGB")
side = max(image.size)
square = Image.new("RGB", (side, side), tuple(fit["background"]))
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
square = square.resize((fit["size"], fit["size"]), Image.Resampling.BICUBIC)
pixels_HWC = (np.asarray(square, np.float32) / 255 - np.float32(fit["mean"])) / np.float32(fit["std"])
pixel_values = pixels_HWC.transpose(2, 0, 1)[None]

# The prompt: one placeholder; rows of a batch would be filled with -1 at the end.
text = prompt["grounding"].replace("{expression}", expression)
input_ids = np.array([tokenizer.encode(text, add_special_tokens=prompt["add_special_tokens"]).ids])


def run(name: str, offered: dict) -> dict:
    """Run a graph with those of the offered tensors that it takes; its outputs by name."""
    inputs = {value.name: offered[value.name] for value in graph[name].get_inputs()}
    outputs = [value.name for value in graph[name].get_outputs()]
    return dict(zip(outputs, graph[name].run(outputs, inputs), strict=True))


# What only some bundles take: how many tokens to keep, where requests choose; the expression, where the pruner reads it.
seen = {"pixel_values": pixel_values, "keep_count": np.array(manifest["pruning"]["kept"])}
if manifest["text_tower"]:
    reader = Tokenizer.from_file(str(folder / "text_tokenizer.json"))
    seen["text_ids"] = np.array([reader.encode(expression).ids])
visual = run("vision", seen)
spliced = run("splice", {"input_ids": input_ids, **visual})
x, ids = spliced["inputs_embeds"], spliced["position_ids"]
next_position, next_slot = spliced["next_position"], spliced["next_slot"]

# One buffer per past/present pair. Not bound in place here: right, but the cache is copied at every step (ONNX Runtime says
# so); gap_export/runtime/ort.py shows the binding.
shape = (1, sizes["kv_heads"], manifest["capacity"], sizes["head_dim"])
cache = {name: np.zeros(shape, x.dtype) for name in manifest["graphs"]["decoder"]["spec"]["aliased"].values()}
write_index, last_index, answer = np.zeros(1, np.int64), next_slot - 1, []
for _ in range(manifest["max_new_tokens"]):
    inputs = {
        "inputs_embeds": x,
        "position_ids": ids,
        "write_index": write_index,
        "last_index": last_index,
        **cache,
    }
    logits, *present = graph["decoder"].run(None, inputs)
    cache = dict(zip(cache, present, strict=True))
    token = logits.argmax(axis=-1)
    if token[0] in prompt["eos_token_ids"]:
        break
    answer.append(int(token[0]))
    (x,) = graph["embed"].run(None, {"input_ids": token[:, None]})
    ids, write_index, last_index = next_position[:, None], next_slot, np.zeros(1, np.int64)
    next_position, next_slot = next_position + 1, next_slot + 1  # two counters, each on its own

print(tokenizer.decode(answer))
