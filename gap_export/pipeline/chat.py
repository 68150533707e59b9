"""Which chat template and which grounding prompt a build takes: the recipe's words, else the checkpoint's own, else the family's.

A published checkpoint's recipe has the prompt that it was measured with. Another checkpoint of the family is spoken to in its own chat template,
as a LLaVA around another language model was trained in that model's words; the published frame is for checkpoints that have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from gap_export.checkpoint import Checkpoint
from gap_export.checkpoint.chat_template import special_tokens, stored_template
from gap_export.errors import CheckpointError, InputError, named
from gap_export.inputs.chat.conversation import Turn, messages_of
from gap_export.inputs.chat.format import ChatFormat, TemplateForm, read_form, with_image_text
from gap_export.inputs.chat.renderer import Renderer
from gap_export.inputs.prompt import SLOT, PromptTemplate
from gap_export.inputs.tokenizer import ids_in_front, tokenizer_errors
from gap_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gap_export.families.base import Family

_SEPARATOR: str = ChatFormat.model_fields["separator"].default
"""Between an image and the text, where a template writes nothing for images."""


@dataclass(frozen=True)
class ChosenTemplate:
    """The chat template that a model is spoken to in.

    Attributes:
        text: in Jinja.
        said: where it is from, in words.
        subject: the file, for messages; the same words where it is the family's.
        is_own: whether it is the checkpoint's, and not its family's frame.
        variables: special tokens that it may name -> their texts.
        begins_twice: whether it spells the start token, and the tokenizer adds another.
    """

    text: str
    said: str
    subject: str
    is_own: bool
    variables: Mapping[str, str] = field(default_factory=dict)
    begins_twice: bool = False


def chosen_template(family: Family, checkpoint: Checkpoint) -> ChosenTemplate | None:
    """The checkpoint's own chat template, or else the published frame of its family.

    Args:
        family: opened on the checkpoint.
        checkpoint: whose folder may hold a template.

    Returns:
        The template; None where there is neither, as of families from outside without a frame.

    Raises:
        CheckpointError: a template of the checkpoint's that is damaged.
    """
    own = stored_template(checkpoint)
    if own is not None:
        return ChosenTemplate(
            text=own.text,
            said=f"the checkpoint's chat template ({own.source})",
            subject=str(checkpoint.folder / own.source),
            is_own=True,
            variables=special_tokens(checkpoint),
        )
    if family.frame is None:
        return None
    said = f"the published frame of {family.row.title}, as the checkpoint has no chat template"
    return ChosenTemplate(
        family.frame.template, said, said, is_own=False, begins_twice=family.frame.begins_twice
    )


def grounding_prompt_of(
    family: Family, recipe: Recipe, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> tuple[PromptTemplate, str]:
    """How expressions become token ids: the recipe's prompt, or the family's question in the template that the model is spoken to in.

    Args:
        family: opened on the checkpoint.
        recipe: of the build.
        tokenizer: of the prompt.
        checkpoint: whose folder may hold a chat template.

    Returns:
        The prompt, and where it is from, in words.

    Raises:
        CheckpointError: a chat template that is damaged, or with which an expression cannot be asked for.
        MissingRequirementError: chat templates cannot be rendered here.
    """
    prompt = family.prompt(recipe).model_copy(update={"images": recipe.images})
    if recipe.prompt is not None:
        return prompt, "the recipe's prompt"
    template, question = chosen_template(family, checkpoint), family.grounding_question
    if template is None or question is None:
        return prompt, f"the prompt of {family.row.title}"
    if not template.is_own:
        return prompt, template.said
    text = _asked(template, question, family)
    doubled = _begins_with_start(text, tokenizer, template.variables.get("bos_token"))
    found = {"grounding": text, "add_special_tokens": prompt.add_special_tokens and not doubled}
    return prompt.model_copy(update=found), template.said


def _asked(template: ChosenTemplate, question: str, family: Family) -> str:
    """A question about one image, with `{expression}` in it, as a template writes it."""
    form = _form_of(
        template.text, tuple(template.variables.items()), family.placeholder, source=template.subject
    )
    with Renderer(template.text, template.variables) as renderer:
        messages = messages_of([Turn("user", question, 1)], form.content, f"{family.image_text}{_SEPARATOR}")
        try:
            text = renderer.render(messages)
        except InputError as error:
            raise CheckpointError(error.message, subject=template.subject, hint=error.hint) from error
    if text.count(SLOT) != 1:
        raise CheckpointError(
            f"writes {text.count(SLOT)} times {SLOT} where it is asked once",
            subject=template.subject,
            hint="write the whole prompt into a recipe (prompt:)",
        )
    return with_image_text(text, family.placeholder, family.image_text)


def _begins_with_start(text: str, tokenizer: Tokenizer, start: str | None) -> bool:
    """Whether a rendered text begins with what the tokenizer puts in front of every text, so that it must not do so again."""
    if start and text.startswith(start):
        return True
    front = ids_in_front(tokenizer)
    with tokenizer_errors("tokenizer.json"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    return bool(front) and ids[: len(front)] == front


@dataclass(frozen=True)
class OpenedChat:
    """How a model is spoken to.

    Attributes:
        prompt: how expressions become token ids.
        template: for free questions, in Jinja; "" where neither checkpoint nor family has one.
        format: how it is used; None in the same case.
        said: where prompt and template are from, and what was found in a second place, a sentence each.
    """

    prompt: PromptTemplate
    template: str
    format: ChatFormat | None
    said: tuple[str, ...]


def open_chat(family: Family, recipe: Recipe, tokenizer: Tokenizer, vocabulary: int) -> OpenedChat:
    """How a model is spoken to: its grounding prompt, its chat template, and what ends its answers.

    Args:
        family: opened on the checkpoint.
        recipe: of the build.
        tokenizer: of the prompt, the image's placeholder in it.
        vocabulary: rows of the decoder's token embedding.

    Raises:
        CheckpointError: a chat template that is damaged, or that cannot be used.
        MissingRequirementError: chat templates cannot be rendered here.
    """
    checkpoint = family.checkpoint
    prompt, said = grounding_prompt_of(family, recipe, tokenizer, checkpoint)
    prompt, own_end = _with_own_end(prompt, tokenizer, checkpoint, vocabulary)
    sentences = [f"boxes are asked for by {said}", *own_end]
    template = chosen_template(family, checkpoint)
    begins_twice = template is not None and template.begins_twice
    if (
        not begins_twice
        and prompt.add_special_tokens
        and _begins_with_start(prompt.grounding, tokenizer, None)
    ):
        sentences.append(
            "the prompt begins with two start tokens: the tokenizer adds one to that which the prompt spells"
        )
    if template is None:
        sentences.append(f"{family.row.title} has no chat template: free questions cannot be asked")
        return OpenedChat(prompt, "", None, tuple(sentences))
    # (`id_to_token` gives names of added tokens as a normaliser would change them.)
    added = tokenizer.get_added_tokens_decoder().get(prompt.image_token_id)
    image_token = added.content if added else family.placeholder
    image_text = family.image_text.replace(family.placeholder, image_token)
    form = TemplateForm("parts", writes_images=True)
    if template.is_own:
        form = _form_of(
            template.text, tuple(template.variables.items()), image_token, source=template.subject
        )
    sentences.append(f"free questions are asked in {template.said}")
    if not form.writes_images:
        sentences.append(
            f"it writes nothing for an image: {image_text} stands in front of what the user says"
        )
    chat = ChatFormat(
        source=template.said,
        content=form.content,
        image_token=image_token,
        image_text=image_text,
        variables=dict(template.variables),
        begins_twice=template.begins_twice,
    )
    return OpenedChat(prompt, template.text, chat, tuple(sentences))


@lru_cache(maxsize=64)
def _form_of(
    text: str, variables: tuple[tuple[str, str], ...], image_token: str, *, source: str
) -> TemplateForm:
    """What a template takes; builds of one checkpoint ask it once."""
    with Renderer(text, dict(variables)) as renderer:
        return read_form(renderer, image_token, source=source)


def _with_own_end(
    prompt: PromptTemplate, tokenizer: Tokenizer, checkpoint: Checkpoint, vocabulary: int
) -> tuple[PromptTemplate, list[str]]:
    """The prompt with the end token of the tokenizer itself among those that end an answer, and what there is to say of that.

    Chat models end a turn with a token of their template, which the configuration of a decoder that was tuned further need not name.
    """
    name = special_tokens(checkpoint).get("eos_token")
    id_ = None if name is None else tokenizer.token_to_id(name)
    if name is None or id_ is None or id_ >= vocabulary or id_ in prompt.eos_token_ids:
        return prompt, []
    ends = (*prompt.eos_token_ids, id_)
    said = f"answers end at {named(name)} ({id_}) too, the tokenizer's own end token"
    return prompt.model_copy(update={"eos_token_ids": ends}), [said]
