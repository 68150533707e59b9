"""Frames of conversation that models were published with, as chat templates: what a checkpoint without a template of its own is spoken to in.

A frame takes content as parts: a list of images and texts. One question about one image, rendered in the frame of its family, is the
family's grounding prompt. What is rendered first is the system's sentence, the family's own unless the conversation begins with a system
turn.
"""

from __future__ import annotations

from dataclasses import dataclass

LLAVA_QUESTION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {expression}."
)
"""What LLaVA-1.5 was trained with (arXiv 2310.03744, table 7), and its successors on the same data."""


@dataclass(frozen=True)
class Frame:
    """How a family's models are spoken to.

    Attributes:
        template: in Jinja.
        image: what stands in a rendered text for one image: the placeholder, and what the model was trained to see around it.
        begins_twice: whether the template spells the start token, and the tokenizer adds another.
    """

    template: str
    image: str
    begins_twice: bool = False


def _parts(image: str) -> str:
    """The content of a message: its images, each as given, and its texts.

    Args:
        image: what is written for one, as a literal of Jinja has it.
    """
    return (
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}"
    )


def _vicuna(image: str, *, person: str) -> str:
    """Vicuna 1.1: `SYSTEM USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:`.

    Args:
        image: what is written for one, as a literal of Jinja has it.
        person: what the system's sentence calls the user.
    """
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    parts = _parts(image)
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ \"{system} \" }}}}{{% endif %}}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'system' %}}{parts}{{{{ ' ' }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ 'USER: ' }}}}{parts}{{{{ ' ' }}}}"
        f"{{% else %}}{{{{ 'ASSISTANT: ' }}}}{parts}{{{{ '</s>' }}}}{{% endif %}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def _mistral(image: str) -> str:
    """Mistral as LLaVA-NeXT has it: `[INST] ... [/INST] ...</s> [INST] ... [/INST]`, a system turn before all.

    Args:
        image: what is written for one, as a literal of Jinja has it.
    """
    parts = _parts(image)
    return (
        "{% for message in messages %}"
        rf"{{% if message['role'] == 'system' %}}{{{{ '<<SYS>>\n' }}}}{parts}{{{{ '\n<</SYS>>\n\n' }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ '[INST] ' }}}}{parts}{{{{ ' [/INST]' }}}}"
        f"{{% else %}}{{{{ ' ' }}}}{parts}{{{{ '</s> ' }}}}{{% endif %}}"
        "{% endfor %}"
    )


def _chatml(image: str, *, system: str = "") -> str:
    r"""ChatML: `<|im_start|>ROLE\n...<|im_end|>\n` for every turn.

    Args:
        image: what is written for one, as a literal of Jinja has it.
        system: sentence of conversations without a system turn; none where it is empty.
    """
    default = (
        "{% if messages[0]['role'] != 'system' %}"
        rf"{{{{ '<|im_start|>system\n{system}<|im_end|>\n' }}}}{{% endif %}}"
    )
    return (
        f"{default if system else ''}"
        "{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' }}"
        rf"{_parts(image)}{{{{ '<|im_end|>\n' }}}}"
        "{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _minigpt_v2(image: str) -> str:
    """MiniGPT-v2: `<s>[INST] ... [/INST]...<s>[INST] ... [/INST]`; a system turn stands before all.

    Args:
        image: what is written for one, as a literal of Jinja has it.
    """
    parts = _parts(image)
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ '<s>[INST] ' }}}}{parts}{{{{ ' [/INST]' }}}}"
        f"{{% else %}}{parts}{{% endif %}}"
        "{% endfor %}"
    )


# `conv_vicuna_v1` of LLaVA's code (haotian-liu/LLaVA, llava/conversation.py): the separators are a blank and `</s>`, the image stands
# in front of the question, on a line of its own.
LLAVA = Frame(_vicuna(r"<image>\n", person="user"), "<image>")

# `conv_llava_v1` of the same file, which the model cards of LLaVA-1.6 with Vicuna have: "human" in the place of "user".
LLAVA_NEXT_VICUNA = Frame(_vicuna(r"<image>\n", person="human"), "<image>")

# Chat template of llava-hf/llava-v1.6-mistral-7b-hf, without a system's sentence.
LLAVA_NEXT_MISTRAL = Frame(_mistral(r"<image>\n"), "<image>")

# ChatML as transformers' tests of LLaVA-OneVision have it, without a system's sentence; the authors' evaluations have one.
LLAVA_ONEVISION = Frame(_chatml(r"<image>\n"), "<image>")

# `vicuna_v1.1` of FastChat, which shikras/shikra takes (mllm/conversation, config/_base_/model/shikra.py); an image is its patches
# between `<im_start>` and `<im_end>`, which take the blanks around them. In its grounding question it stands inside the sentence.
SHIKRA = Frame(_vicuna("<im_start><im_patch><im_end> ", person="user"), "<im_start><im_patch><im_end>")

# `CONV_VISION_minigptv2` of Vision-CAIR/MiniGPT-4 (minigpt4/conversation/conversation.py, demo_v2.py): nothing between an answer and
# the next question, whose `<s>` is spelled. `Chat.ask` puts a blank between the image and the question.
MINIGPT_V2 = Frame(_minigpt_v2("<Img><ImageHere></Img> "), "<Img><ImageHere></Img>", begins_twice=True)

# Chat templates of Qwen/Qwen2-VL-7B-Instruct, Qwen2.5-VL and Qwen3-VL: nothing stands between an image and the text, and the first two
# generations have a system's sentence.
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN2_VL = Frame(_chatml(_QWEN_IMAGE, system="You are a helpful assistant."), _QWEN_IMAGE)
QWEN3_VL = Frame(_chatml(_QWEN_IMAGE), _QWEN_IMAGE)

# Chat template of OpenGVLab/InternVL3-8B-hf, with what its processor puts around an image's tokens.
INTERNVL = Frame(_chatml(r"<img><IMG_CONTEXT></img>\n"), "<img><IMG_CONTEXT></img>")
