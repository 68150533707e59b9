"""Which grounding prompt a build takes: the recipe's, one in the checkpoint's own chat template, or the family's published frame."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from gap_export import families
from gap_export.checkpoint import open_checkpoint
from gap_export.errors import CheckpointError
from gap_export.inputs.prompt import PromptTemplate
from gap_export.pipeline.chat import ChosenTemplate, chosen_template, grounding_prompt_of
from gap_export.recipe.recipe import Recipe

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {expression}."
CHATML = (
    r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    r"{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    r"{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS_ALONE = (
    "{% for m in messages %}{{ bos_token + '[' + m['role'] + '] ' + m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' [assistant]' }}{% endif %}"
)
NO_IMAGES = (
    "{% for m in messages %}{% for part in m['content'] if part.type == 'text' %}{{ 'Q: ' + part.text }}{% endfor %}"
    "{% endfor %}{{ ' A:' }}"
)


def checkpoint_with(tiny_checkpoint: Path, folder: Path, files: dict[str, Any]) -> Path:
    """The tiny checkpoint with further files; its weights are linked."""
    folder.mkdir(exist_ok=True)
    for path in tiny_checkpoint.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
        else:
            (folder / path.name).symlink_to(path)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def opened(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    row = families.row_of(checkpoint)
    return row.load()(row, checkpoint)


def asked(folder: Path, *, tokenizer: Tokenizer | None = None, **recipe: Any) -> tuple[PromptTemplate, str]:
    family = opened(folder)
    given = Recipe(name="x", checkpoint=str(folder), **recipe)
    return grounding_prompt_of(family, given, tokenizer or family.tokenizer(), family.checkpoint)


def test_the_recipes_words_come_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": "{{ damaged"})
    prompt, said = asked(folder, prompt="<image> {expression}?", images=1)
    assert (prompt.grounding, said) == ("<image> {expression}?", "the recipe's prompt")
    assert prompt.add_special_tokens


def test_the_checkpoints_template_comes_before_the_familys_frame(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": CHATML})
    prompt, said = asked(folder)
    assert prompt.grounding == f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert said == "the checkpoint's chat template (chat_template.jinja)"
    assert prompt.add_special_tokens
    assert (prompt.image_token_id, prompt.eos_token_ids, prompt.images) == (4, (2,), 1)


def test_without_a_template_the_frame_is_taken_and_said(tiny_checkpoint: Path) -> None:
    prompt, said = asked(tiny_checkpoint)
    family = opened(tiny_checkpoint)
    assert prompt.grounding == family.grounding_prompt
    assert said == "the published frame of LLaVA-1.5, as the checkpoint has no chat template"
    assert prompt.add_special_tokens
    assert chosen_template(family, family.checkpoint) == ChosenTemplate(
        family.frame.template, said, said, is_own=False
    )


@pytest.mark.parametrize("named", [True, False])
def test_templates_of_texts_get_the_image_in_front_and_one_start_token(
    named: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The start token is known by its name, or by what the tokenizer adds."""
    text = TEXTS_ALONE if named else TEXTS_ALONE.replace("bos_token", "'<s>'")
    config = {"chat_template": text, **({"bos_token": {"content": "<s>"}} if named else {})}
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"tokenizer_config.json": config})
    prompt, said = asked(folder)
    assert prompt.grounding == f"<s>[user] <image>\n{QUESTION} [assistant]"
    assert said == "the checkpoint's chat template (tokenizer_config.json)"
    assert not prompt.add_special_tokens
    ids = opened(folder).tokenizer().encode(prompt.grounding, add_special_tokens=False).ids
    assert ids.count(1) == 1


def test_templates_that_write_no_image_get_it_in_the_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": NO_IMAGES})
    assert asked(folder)[0].grounding == f"Q: <image>\n{QUESTION} A:"


def test_what_surrounds_an_image_is_added_where_a_template_leaves_it_to_the_processor(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gap_export.families.frames import Frame
    from gap_export.families.llava import Llava

    monkeypatch.setattr(Llava, "frame", Frame("", "<img><image></img>"))
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": CHATML})
    assert "user\n<img><image></img>\nPlease" in asked(folder)[0].grounding


def test_a_family_without_a_question_keeps_its_prompt(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gap_export.families.llava import Llava

    monkeypatch.setattr(Llava, "frame", None)
    monkeypatch.setattr(Llava, "grounding_question", None)
    assert asked(tiny_checkpoint)[1] == "the prompt of LLaVA-1.5"
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": CHATML})
    assert asked(folder)[0].grounding == Llava.grounding_prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}", "cannot be used"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0]['content'][-1]['text'] | replace('{expression}', '') }}", "0 times {expression}"),
        ("hello", "writes nothing of what the user says"),
        (CHATML.replace(r"'<image>\n'", r"'<image><image>\n'"), "4 times for two images"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_its_name(
    text: str, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": text})
    with pytest.raises(CheckpointError, match=message) as refused:
        asked(folder)
    assert refused.value.subject == str(folder / "chat_template.jinja")
    assert "\n" not in str(refused.value)


def test_a_start_token_of_another_name_is_not_taken_for_the_tokenizers(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A template may begin with a token that the tokenizer does not add: its own is added then, as transformers does."""
    folder = checkpoint_with(tiny_checkpoint, tmp_path / "own", {"chat_template.jinja": "<|begin|>" + CHATML})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True, normalized=False)])
    prompt, _ = asked(folder, tokenizer=tokenizer)
    assert prompt.grounding.startswith("<|begin|><|im_start|>user")
    assert prompt.add_special_tokens
