"""Token ids as the originals make them, by the slow tokenizers of the transformers versions they pin, on a small real SentencePiece model.

    python -m venv ENV && ENV/bin/pip install sentencepiece protobuf transformers==4.31.0
    ENV/bin/python bench/slow_tokenizers.py train          # once: tests/checkpoint/sentencepiece/tokenizer.model
    ENV/bin/python bench/slow_tokenizers.py record         # this version's ids into tests/checkpoint/sentencepiece/slow_ids.json

Recorded with 4.28.1 (MiniGPT-v2, Shikra), 4.31.0 and 4.37.2 (LLaVA-1.5), one environment each. `gap_export` is not imported. What is done to
a prompt follows `tokenizer_image_token` (haotian-liu/LLaVA, llava/mm_utils.py), `get_context_emb` (Vision-CAIR/MiniGPT-4,
minigpt4/models/minigpt_base.py) and `ShikraTextProcess` (shikras/shikra, mllm/dataset/process_function/shikra_process_function.py).
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "checkpoint" / "sentencepiece"
MODEL, RECORD = FOLDER / "tokenizer.model", FOLDER / "slow_ids.json"
ADDED = ("<im_patch>", "<im_start>", "<im_end>")
IMAGE = -200

VICUNA = "The assistant gives polite answers. USER: "
PROMPTS = {
    "llava": [
        VICUNA
        + "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: {}. ASSISTANT:",
        VICUNA + "<image> {} ASSISTANT:",
        "<image>{}",
        "{} <image>",
        "{}  <image>  {}",
    ],
    "minigpt_v2": [
        "<s>[INST] <Img><ImageHere></Img> [refer] give me the location of {} [/INST]",
        "<s>[INST] <ImageHere> {} [/INST]",
    ],
    "shikra": [
        VICUNA
        + "Can you point out {} in the image <im_start><im_patch><im_end> and provide the coordinates of its location? ASSISTANT:",
        VICUNA + "<im_start><im_patch><im_end> {} ASSISTANT:",
        VICUNA + "{}<im_start><im_patch><im_end>? ASSISTANT:",
        "where  <im_start><im_patch><im_end>\n is {}",
    ],
}
EXPRESSIONS = ["the red mug", "a dog, left", "zebra's 2nd stripe", "naïve 猫 <3", "[the] (image) ▁ mark"]
CORPUS = [
    text.replace("{}", words) for texts in PROMPTS.values() for text in texts for words in EXPRESSIONS[:3]
] * 4


def train() -> None:
    """BPE with bytes for what is unknown, blanks as they are, nothing normalised: Llama's settings."""
    import sentencepiece

    plain = [line for text in CORPUS for line in text.replace("<", " ").replace(">", " ").split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        hard_vocab_limit=False,
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(model.getvalue())


def llava(tokenizer, prompt: str) -> list[int]:
    """The placeholder's id is -200."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    assert all(chunk[0] == tokenizer.bos_token_id for chunk in chunks)
    ids = [chunks[0][0]]
    for number, chunk in enumerate(chunks):
        ids += ([IMAGE] if number else []) + chunk[1:]
    return ids


def minigpt_v2(tokenizer, prompt: str) -> list[int]:
    ids: list[int] = []
    for number, piece in enumerate(prompt.split("<ImageHere>")):
        ids += ([IMAGE] if number else []) + tokenizer(piece, add_special_tokens=number == 0).input_ids
    return ids


def shikra(tokenizer, prompt: str) -> list[int]:
    """One `<im_patch>` stands for all."""
    placeholder = tokenizer.convert_tokens_to_ids(ADDED[0])
    return [IMAGE if id_ == placeholder else id_ for id_ in tokenizer(prompt).input_ids]


def record() -> None:
    """Add the ids of this environment's transformers."""
    import transformers

    version = transformers.__version__
    of_version = {"4.28": ("minigpt_v2", "shikra"), "4.31": ("llava",), "4.37": ("llava",)}[version[:4]]
    rows = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else []
    rows = [row for row in rows if row["transformers"] != version]
    for family in of_version:
        for legacy in (None, True, False):
            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(MODEL, folder)
                config = {
                    "tokenizer_class": "LlamaTokenizer",
                    **({} if legacy is None else {"legacy": legacy}),
                }
                (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
                tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
            if family == "shikra":
                tokenizer.add_tokens([ADDED[0]], special_tokens=True)
                tokenizer.add_tokens(list(ADDED[1:]), special_tokens=True)
            for text in PROMPTS[family]:
                for words in EXPRESSIONS:
                    ids = globals()[family](tokenizer, text.replace("{}", words))
                    rows.append({"family": family, "transformers": version, "legacy": legacy, "prompt": text, "expression": words, "ids": ids})  # fmt: skip
    RECORD.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    {"train": train, "record": record}[sys.argv[1]]()
