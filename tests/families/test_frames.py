"""Published frames: one question in them is the family's grounding prompt, to the byte, and longer conversations are as published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gap_export.families import frames, table
from gap_export.families.frames import Frame
from gap_export.inputs.chat.conversation import Turn, messages_of
from gap_export.inputs.chat.format import read_form, with_image_text
from gap_export.inputs.chat.renderer import Renderer
from gap_export.recipe.recipe import Recipe, known_recipes, load_recipe

TEMPLATES = Path(__file__).parents[1] / "inputs" / "chat" / "templates"

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_LLAVA = (
    f"{_VICUNA}USER: <image>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}. ASSISTANT:"
)
PROMPTS = {
    "internvl3": "<|im_start|>user\n<img><IMG_CONTEXT></img>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: <ref>{expression}</ref><|im_end|>\n"
    "<|im_start|>assistant\n",
    "llava": _LLAVA,
    "llava-13b": _LLAVA,
    "llava-original": _LLAVA,
    "llava-next": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: <image>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}. ASSISTANT:",
    "llava-next-mistral": "[INST] <image>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}. [/INST]",
    "llava-onevision": "<|im_start|>user\n<image>\n"
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "minigpt-v2": "<s>[INST] <Img><ImageHere></Img> [refer] give me the location of {expression} [/INST]",
    "qwen2-vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Give the bounding box of <|object_ref_start|>{expression}<|object_ref_end|>.<|im_end|>\n<|im_start|>assistant\n",
    "qwen2.5-vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Locate {expression}, output its bbox coordinates using JSON format.<|im_end|>\n<|im_start|>assistant\n",
    "qwen3-vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Locate {expression}, report its bbox coordinates in JSON format.<|im_end|>\n<|im_start|>assistant\n",
    "shikra": f"{_VICUNA}USER: Can you point out {{expression}} in the image <im_start><im_patch><im_end> "
    "and provide the coordinates of its location? ASSISTANT:",
}
"""Recipe -> the prompt that boxes were asked for in before there were chat templates."""

FRAMES: dict[str, Frame] = {name: value for name, value in vars(frames).items() if isinstance(value, Frame)}


@pytest.fixture(scope="module")
def renderers() -> Iterator[dict[str, Renderer]]:
    made = {name: Renderer(frame.template) for name, frame in FRAMES.items()}
    yield made
    for renderer in made.values():
        renderer.close()


def facts_of(name: str) -> tuple[Frame, str, str, str]:
    """Frame, question, grounding prompt and placeholder of a recipe's family."""
    family: Any = table.row(str(load_recipe(name).family)).load()
    if name.startswith("llava-next"):
        from gap_export.families import llava_next

        decoder = "mistral" if "mistral" in name else "llama"
        prompt = llava_next.GROUNDING_PROMPTS[decoder]
        return llava_next.FRAMES[decoder], family.grounding_question, prompt, family.placeholder
    return family.frame, family.grounding_question, family.grounding_prompt, family.placeholder


def test_every_published_recipe_has_the_prompt_of_before() -> None:
    assert {name: load_recipe(name).prompt for name in known_recipes() if name != "shapes"} == PROMPTS


@pytest.mark.parametrize("name", PROMPTS)
def test_one_question_in_the_frame_is_the_grounding_prompt(name: str, renderers: dict[str, Renderer]) -> None:
    frame, question, prompt, placeholder = facts_of(name)
    assert prompt == PROMPTS[name]
    assert question.count("{expression}") == 1
    assert frame.image.count(placeholder) == 1
    (renderer,) = (renderers[known] for known, each in FRAMES.items() if each is frame)
    form = read_form(renderer, placeholder, source=name)
    assert (form.content, form.writes_images) == ("parts", True)
    rendered = renderer.render(messages_of([Turn("user", question, 1)], form.content))
    assert rendered.count(frame.image) == 1
    if name == "shikra":
        image = "<im_start><im_patch><im_end>"
        assert rendered == f"{_VICUNA}USER: {image} {question} ASSISTANT:"
        assert question == prompt[len(f"{_VICUNA}USER: ") : -len(" ASSISTANT:")].replace(f" {image}", "")
    else:
        assert rendered == prompt


SPOKEN = [
    Turn("user", "What is it?", 1),
    Turn("assistant", "A mug."),
    Turn("user", "And this?", 2),
    Turn("assistant", "Ja."),
    Turn("user", "{{ 1 }} ❤"),
]
WITH_SYSTEM = [Turn("system", "Be kind."), *SPOKEN[:3]]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

WRITTEN = {
    "LLAVA": f"{_VICUNA}USER: <image>\nWhat is it? ASSISTANT: A mug.</s>USER: <image>\n<image>\nAnd this? ASSISTANT: Ja.</s>"
    "USER: {{ 1 }} ❤ ASSISTANT:",
    "MINIGPT_V2": "<s>[INST] <Img><ImageHere></Img> What is it? [/INST]A mug."
    "<s>[INST] <Img><ImageHere></Img> <Img><ImageHere></Img> And this? [/INST]Ja.<s>[INST] {{ 1 }} ❤ [/INST]",
    "LLAVA_ONEVISION": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA mug.<|im_end|>\n"
    "<|im_start|>user\n<image>\n<image>\nAnd this?<|im_end|>\n<|im_start|>assistant\nJa.<|im_end|>\n"
    "<|im_start|>user\n{{ 1 }} ❤<|im_end|>\n<|im_start|>assistant\n",
}
WRITTEN["LLAVA_NEXT_VICUNA"] = WRITTEN["LLAVA"].replace("user", "human")
WRITTEN["SHIKRA"] = WRITTEN["LLAVA"].replace("<image>\n", "<im_start><im_patch><im_end> ")
SYSTEM = {
    "LLAVA": "Be kind. USER: <image>\nWhat is it?",
    "LLAVA_NEXT_VICUNA": "Be kind. USER: <image>\nWhat is it?",
    "SHIKRA": "Be kind. USER: <im_start>",
    "MINIGPT_V2": "Be kind.<s>[INST] <Img>",
    "LLAVA_ONEVISION": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_later_turns_follow_the_authors_code(name: str, renderers: dict[str, Renderer]) -> None:
    assert renderers[name].render(messages_of(SPOKEN, "parts")) == WRITTEN[name]
    assert renderers[name].render(messages_of(WITH_SYSTEM, "parts")).startswith(SYSTEM[name])


PUBLISHED = {
    "LLAVA_NEXT_MISTRAL": "llava_next_mistral",
    "QWEN2_VL": "qwen2_vl",
    "QWEN3_VL": "qwen3_vl",
    "INTERNVL": "internvl3",
}


def test_every_frame_is_checked() -> None:
    assert FRAMES.keys() == WRITTEN.keys() | PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prompt", [True, False])
def test_later_turns_are_as_in_the_published_template(
    name: str, prompt: bool, renderers: dict[str, Renderer]
) -> None:
    with Renderer((TEMPLATES / f"{PUBLISHED[name]}.jinja").read_text()) as published:
        for turns in (SPOKEN, WITH_SYSTEM):
            messages = messages_of(turns, "parts")
            theirs = published.render(messages, add_generation_prompt=prompt)
            if name == "INTERNVL":
                theirs = with_image_text(theirs, "<IMG_CONTEXT>", frames.INTERNVL.image)
            assert renderers[name].render(messages, add_generation_prompt=prompt) == theirs


def test_a_published_prompt_is_not_taken_to_another_checkpoint() -> None:
    """What a user says, or what was trained, is."""
    assert Recipe.load("llava").prompt == Recipe.load("llava", keep=0.5).prompt == PROMPTS["llava"]
    assert Recipe.load("llava", checkpoint="owner/other").prompt is None
    assert Recipe.load("llava", checkpoint=load_recipe("llava").checkpoint).prompt == PROMPTS["llava"]
    mine = "<image> {expression}?"
    assert Recipe.load("llava", checkpoint="owner/other", prompt=mine).prompt == mine
    assert Recipe.load("shapes", checkpoint="trained").prompt == load_recipe("shapes").prompt
    assert Recipe.load("owner/other").prompt is None


def test_a_file_of_the_users_own_keeps_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "llava.yaml"
    path.write_text(known_recipes()["llava"].read_text())
    assert Recipe.load(str(path), checkpoint="owner/other").prompt == PROMPTS["llava"]
