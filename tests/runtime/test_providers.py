"""What providers are called in one text: every set of options comes back as it was given, and what is no name is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.errors import SessionError
from gap_export.runtime import backends
from gap_export.runtime.providers import Provider, providers_in, split_outside_braces

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}[A-Za-z0-9]", fullmatch=True)
VALUES = st.text(max_size=12).filter(str.isprintable)
OPTIONS = st.dictionaries(VALUES.filter(bool), VALUES, max_size=3)


@given(
    st.lists(st.builds(Provider, NAMES, OPTIONS), min_size=1, max_size=3, unique_by=lambda each: each.name)
)
def test_what_is_written_is_read_again(providers: list[Provider]) -> None:
    text = "+".join(map(str, providers))
    assert list(providers_in(text)) == providers
    assert split_outside_braces(text, "+") == list(map(str, providers))
    whole = f"onnxruntime:cuda:1@{text}"
    found = backends.runtime(whole)
    assert list(found.providers) == providers
    assert str(found) == whole
    assert backends.runtime("onnxruntime", device="cuda:1", providers=list(map(str, providers))) == found


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("some-ep{a: 1}", {"a": "1"}),
        ("some-ep{a: yes, b: '1e3'}", {"a": "yes", "b": "1e3"}),
        ('some-ep{"a": "}+{"}', {"a": "}+{"}),
        ("some-ep{a: 'it''s'}", {"a": "it's"}),
        ("some-ep{a: it's}", {"a": "it's"}),
        ("some-ep{}", {}),
        (" some-ep", {}),
    ],
)
def test_options_are_a_mapping_of_strings(text: str, options: dict[str, str]) -> None:
    assert providers_in(text) == (Provider("some-ep", options),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "provider '': is not a name"),
        ("+", "provider '': is not a name"),
        ("a ep", "provider 'a ep': is not a name"),
        ("../ep", "is not a name"),
        ("ep{", "provider 'ep{': has options that do not end"),
        ("ep{a: 1", "has options that do not end"),
        ("ep{a: 1}}", "options of provider ep: '{a: 1}}': cannot be read"),
        ("ep{a: [1]}", "is no mapping of strings to strings"),
        ("ep{a: {b: c}}", "are no mapping of strings to strings"),
        ('ep{a: "\\n"}', "has characters that cannot be printed"),
        ("ep{a: 1, a: 2}", "gives 'a' twice"),
        ("ep{'': 2}", "is no mapping of strings to strings"),
        ("ep+ep{a: 1}", "provider ep: is named twice"),
        ("ep{a: " + "1" * 5000 + "}", "has 5007 characters: at most 1024"),
        ("ep" + "{" * 1000, "are no mapping"),
    ],
)
def test_what_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(SessionError, match=message.replace("{", r"\{").replace("+", r"\+")):
        providers_in(text)


def test_only_onnx_runtime_has_them() -> None:
    for text, options in (("openvino@some-ep", {}), ("torch", {"providers": ["some-ep"]})):
        with pytest.raises(SessionError, match="has no execution providers to choose from"):
            backends.runtime(text, **options)
