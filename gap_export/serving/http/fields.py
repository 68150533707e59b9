"""How bodies are checked: strict types, no unknown field, and what is wrong with one said in a line that names the field."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from gap_export.serving.http.errors import HttpError

LONGEST_URL = 2**26
"""Characters; the bound of images is far below."""
_MOST_NAMED = 5
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field here",
    "none_required": "must be null",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing_size": "is too large",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be of type {expected_tags}",
    "union_tag_not_found": "has no type",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length}",
    "too_long": "must have at most {max_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
}
"""Kind of fault -> what is said of it."""

BodyType = TypeVar("BodyType", bound="Body")


class Body(BaseModel):
    """Base of what requests bring."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ImageUrl(Body):
    """An image by its address.

    Attributes:
        url: a data URL (`data:image/png;base64,...`), or https where the server allows the host.
        detail: OpenAI's; images are always seen as the model sees them.
    """

    url: Annotated[str, Field(max_length=LONGEST_URL)]
    detail: Annotated[str, WithJsonSchema({"const": "auto"}), Field(pattern="^auto$")] | None = None


def _image(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


_URL_SCHEMA = {"type": "string", "description": "data:image/png;base64,..."}
Image = Annotated[
    ImageUrl,
    BeforeValidator(_image),
    WithJsonSchema(
        {
            "anyOf": [
                _URL_SCHEMA,
                {
                    "type": "object",
                    "properties": {"url": _URL_SCHEMA, "detail": {"enum": ["auto", None]}},
                    "required": ["url"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
"""An address, or an object with it."""
KeepField = Annotated[float, Field(gt=0, le=1)]
TokensField = Annotated[int, Field(ge=1, le=10**6)]
TextField = Annotated[str, Field(min_length=1)]


def checked(
    model: type[BodyType], value: dict[str, Any], *, not_implemented: frozenset[str] = frozenset()
) -> BodyType:
    """A body as its model has it.

    Args:
        model: of it.
        value: as it was sent.
        not_implemented: fields that are known, and taken at the value alone that changes nothing.

    Raises:
        HttpError: 400; it names the first field that is wrong, and all that are unknown.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    unknown = [_name(fault["loc"]) for fault in faults if fault["type"] == "extra_forbidden"]
    if unknown:
        shown = ", ".join(unknown[:_MOST_NAMED]) + (", ..." if len(unknown) > _MOST_NAMED else "")
        raise HttpError(400, f"{shown}: {_WORDS['extra_forbidden']}", param=unknown[0], code="unknown_field")
    first = faults[0]
    name = _name(first["loc"])
    words = _WORDS.get(first["type"], "cannot be used")
    message = words.format_map(first.get("ctx", {})) if first["type"] in _WORDS else words
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])  # raised by validators of this package
    if first["loc"] and first["loc"][0] in not_implemented:
        raise HttpError(
            400,
            f"{name}: is not implemented at this value ({message}); leave it out",
            param=name,
            code="not_implemented",
        )
    raise HttpError(400, f"{name}: {message}", param=name)


def _name(location: tuple[int | str, ...]) -> str:
    """A field as one writes it: `messages[0].content[1].text`."""
    name, kind_follows = "", False
    for part in location:
        if kind_follows and part in ("text", "image_url"):  # the kind of a part, no field
            kind_follows = False
            continue
        kind_follows = isinstance(part, int) and ".content[" in f"{name}["
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            shown = part if len(part) <= 60 else f"{part[:60]}..."
            name += f".{shown}" if name else shown
    return name or "the body"
