"""A manifest is checked, not believed: every field against limits, against the others, and against what follows from them.

    check_manifest   the fields against each other
    check_graphs     the graphs' own inputs and outputs against the specs

Faults are phrases about one field each; the first is the error. Later checks rely on what earlier ones made sure of: sizes are known to be small
before anything is computed from them.
"""

from __future__ import annotations

from gap_export.boxes.codecs import CODECS
from gap_export.bundle.check.files import CHAT_TEMPLATE, file_faults
from gap_export.bundle.check.graphs import check_graphs, description_faults, spec_faults
from gap_export.bundle.check.limits import LARGEST_VOCABULARY, Faults, outside
from gap_export.bundle.check.model import layout_faults, model_faults, visual_faults
from gap_export.bundle.check.pruning import pruning_faults
from gap_export.bundle.manifest import Manifest
from gap_export.errors import BundleError, in_one_line, shown
from gap_export.inputs.layouts import SquareLayout
from gap_export.inputs.prompt import SLOT, TextTower
from gap_export.precision import precision

__all__ = [
    "check_graphs",
    "check_manifest",
    "layout_faults",
    "manifest_faults",
    "model_faults",
    "visual_faults",
]

LONGEST_CHAT_TEXT, MOST_VARIABLES = 1000, 10_000
LARGEST_CACHE = 2**36
"""Bytes of the cache of one row (64 GiB); and of the embeddings of one prompt."""


def check_manifest(manifest: Manifest, *, subject: str) -> None:
    """Refuse a manifest that contradicts itself.

    Args:
        manifest: as it was read; every field by itself is of the right type.
        subject: where it is from, for the message.

    Raises:
        BundleError: with the first field that cannot be.
    """
    fault = next(manifest_faults(manifest), None)
    if fault is not None:
        raise BundleError(
            f"contradicts itself: {in_one_line(fault)}",
            subject=subject,
            hint="the bundle is damaged: build it again",
        )


def manifest_faults(manifest: Manifest) -> Faults:
    """What is wrong with a manifest; nothing where all is well."""
    yield from model_faults(manifest.spec)
    yield from layout_faults(manifest.layout)
    yield from visual_faults(manifest.spec, manifest.layout)
    yield from _box_faults(manifest)
    yield from _size_faults(manifest)
    yield from _text_faults(manifest)
    yield from pruning_faults(manifest)
    yield from _length_faults(manifest)
    yield from _prompt_faults(manifest)
    yield from _chat_faults(manifest)
    yield from _recipe_faults(manifest)
    yield from file_faults(manifest)
    yield from spec_faults(manifest)
    yield from description_faults(manifest)


def _size_faults(manifest: Manifest) -> Faults:
    model, recipe = manifest.spec, manifest.recipe
    yield from outside(
        [
            ("pruning.pruner_min_tokens", manifest.pruning.pruner_min_tokens, 1, model.visual_tokens),
            ("pruning.seed", manifest.pruning.seed, 0, 2**63 - 1),
            ("capacity", manifest.capacity, 1, 2**24),
            ("max_new_tokens", manifest.max_new_tokens, 1, 2**20),
            ("prompt.images", manifest.prompt.images, 1, 2**10),
            ("recipe.max_text", recipe.max_text, 2, 2**20),
            ("recipe.max_batch", recipe.max_batch, 1, 2**16),
        ]
    )
    row_bytes = precision(manifest.precision).activations.bytes
    runs = manifest.pruning.cache_layout(model.layers, manifest.capacity, static=True)
    cache = 2 * runs.total_slots(runs.capacities) * model.kv_heads * model.head_dim * row_bytes
    embeds = manifest.capacity * model.embedding_width * row_bytes
    for what, nbytes in (("a cache", cache), ("embeddings", embeds)):
        if nbytes > LARGEST_CACHE:
            yield (
                f"capacity is {manifest.capacity}, which makes {what} of {nbytes} bytes for one row: "
                f"the limit is {LARGEST_CACHE}"
            )


def _text_faults(manifest: Manifest) -> Faults:
    """What reads the expression, against its limits, the decoder and the recipe."""
    tower, model, recipe = manifest.text_tower, manifest.spec, manifest.recipe
    if tower is None:
        return
    by_embeddings = tower.kind == "embeddings"
    if by_embeddings != (tower.checkpoint is None):
        yield f"text_tower.kind is {tower.kind}, and text_tower.checkpoint is {shown(tower.checkpoint)}"
    yield from outside(
        [
            ("text_tower.context", tower.context, *((1, 2**20) if by_embeddings else (3, 2**16))),
            ("text_tower.width", tower.width, 1, 2**17),
            ("text_tower.vocabulary", tower.vocabulary, 1, LARGEST_VOCABULARY),
        ]
    )
    if tower.checkpoint != recipe.text_tower:
        yield f"text_tower.checkpoint is {shown(tower.checkpoint)}, and the recipe says {shown(recipe.text_tower)}"
    if by_embeddings:
        follows = TextTower.of_embeddings(
            width=model.hidden_size, vocabulary=model.vocabulary, longest=recipe.max_text
        )
        for field in ("context", "width", "vocabulary", "aligned_inversely"):
            said, right = getattr(tower, field), getattr(follows, field)
            if said != right:
                yield f"text_tower.{field} is {shown(said)}, and that of the decoder's embeddings is {shown(right)}"


def _box_faults(manifest: Manifest) -> Faults:
    layout = manifest.layout
    codec = CODECS.get(manifest.box.codec)
    if codec is None:
        yield f"box.codec is {shown(manifest.box.codec)}, and the codecs are {', '.join(CODECS)}"
    elif codec.pixels and layout.pixels_of != manifest.box.frame:
        yield f"box.frame is {manifest.box.frame}, and box.codec {codec.name} is in pixels of {layout.pixels_of or 'tiles or a part'}"
    if manifest.box.frame == "padded_square" and isinstance(layout, SquareLayout) and layout.fit != "pad":
        yield f"box.frame is padded_square, and layout.fit is {layout.fit}"


def _length_faults(manifest: Manifest) -> Faults:
    """Whether the longest prompt and answer fit into cache and positions."""
    images = manifest.prompt.images
    text = manifest.recipe.max_text - images
    if text < 1:
        yield f"recipe.max_text is {manifest.recipe.max_text}, with {images} images in a prompt"
    if images > 1 and manifest.spec.token_range is None:
        yield f"prompt.images is {images}, and images of one size come one to a prompt"
    longest = text + manifest.max_new_tokens
    slots = longest + images * manifest.pruning.max_tokens
    if slots > manifest.capacity:
        yield f"capacity is {manifest.capacity}, and the longest prompt and answer need {slots}"
    positions = longest + images * manifest.spec.visual_tokens
    if positions > manifest.spec.max_positions:
        yield f"spec.max_positions is {manifest.spec.max_positions}, and the longest prompt and answer need {positions}"


def _prompt_faults(manifest: Manifest) -> Faults:
    prompt, vocabulary = manifest.prompt, manifest.spec.vocabulary
    if prompt.grounding.count(SLOT) != 1:
        yield f"prompt.grounding has {prompt.grounding.count(SLOT)} times {SLOT}"
    # (The placeholder's own id need not be in the table: what stands in its place comes from the image.)
    yield from outside([("prompt.image_token_id", prompt.image_token_id, 0, LARGEST_VOCABULARY)])
    for number, token in enumerate(prompt.eos_token_ids):
        if not 0 <= token < vocabulary:
            yield f"prompt.eos_token_ids.{number} is {shown(token)}, of a vocabulary of {vocabulary}"
        if token == prompt.image_token_id or token in prompt.eos_token_ids[:number]:
            yield f"prompt.eos_token_ids.{number} is {token}, which has a meaning already"


def _chat_faults(manifest: Manifest) -> Faults:
    chat, is_listed = manifest.chat, CHAT_TEMPLATE in manifest.files
    if (chat is not None) != is_listed:
        yield f"chat is {'none' if chat is None else 'given'}, and {CHAT_TEMPLATE} is {'' if is_listed else 'not '}among the files"
    if chat is None:
        return
    if chat.image_text.count(chat.image_token) != 1:
        yield f"chat.image_text is {shown(chat.image_text)}, and has the placeholder {shown(chat.image_token)} in it once"
    if not chat.source.isprintable():
        yield f"chat.source is {shown(chat.source)}, and is words"
    if chat.separator.strip():
        yield f"chat.separator is {shown(chat.separator)}, and is white space"
    lengths = [
        len(chat.source),
        len(chat.image_text),
        len(chat.separator),
        *map(len, (*chat.variables, *chat.variables.values())),
    ]
    yield from outside(
        [
            ("the longest text of chat", max(lengths), 0, LONGEST_CHAT_TEXT),
            ("the number of chat.variables", len(chat.variables), 0, MOST_VARIABLES),
        ]
    )


def _recipe_faults(manifest: Manifest) -> Faults:
    """What a build takes over from the recipe as it is."""
    recipe, pruning = manifest.recipe, manifest.pruning
    keep: object = recipe.keep
    if isinstance(recipe.keep, tuple):
        keep = recipe.keep[1]
    elif recipe.keep == "adaptive":
        keep = recipe.keep_bound
    keep_range = (recipe.keep[0], recipe.keep[-1]) if isinstance(recipe.keep, tuple) else None
    random = recipe.weights == "random"
    targets = sorted({target for target in recipe.targets if target != "onnx"})
    pairs: list[tuple[str, object, object]] = [
        ("name", manifest.name, recipe.name),
        ("family", manifest.family, recipe.family or manifest.family),
        ("checkpoint", manifest.checkpoint, "random" if random else recipe.checkpoint),
        ("precision", manifest.precision, recipe.precision),
        ("pruning.pruner", pruning.pruner, recipe.pruner),
        ("pruning.positions", pruning.positions, recipe.positions),
        ("pruning.seed", pruning.seed, recipe.seed),
        ("pruning.merged_id", pruning.merged_id, recipe.merged_id),
        ("pruning.keep", pruning.keep, keep),
        ("pruning.keep_range", pruning.keep_range, keep_range),
        ("pruning.keep_mode", pruning.finds_count, recipe.keep == "adaptive"),
        ("max_new_tokens", manifest.max_new_tokens, recipe.max_new_tokens),
        ("box.codec", manifest.box.codec, recipe.box_format or manifest.box.codec),
        ("capacity", manifest.capacity, recipe.capacity or manifest.capacity),
        ("prompt.images", manifest.prompt.images, recipe.images),
        ("prompt.grounding", manifest.prompt.grounding, recipe.prompt or manifest.prompt.grounding),
        ("gates", manifest.gates, recipe.gates or manifest.gates),
        ("engines", sorted(manifest.engines), targets),
    ]
    for field, said, built in pairs:
        if said != built:
            yield f"{field} is {shown(said)}, and the recipe says {shown(built)}"
