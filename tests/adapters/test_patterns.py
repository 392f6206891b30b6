"""Module patterns match exactly where peft's regular expressions do, or are refused."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loraplex_adapters.base import LINEARS, module_path
from loraplex_adapters.errors import UnsupportedAdapter
from loraplex_adapters.patterns import ModulePatterns

PATHS = [module_path(layer, linear) for layer in (0, 1, 10, 11) for linear in LINEARS]
PIECES = [
    *["q", "_", ".", "1", "0", "proj", "layers", "model", "mlp", "self_attn"],
    *[
        r"\.",
        r"\d",
        r"\w",
        r"[01]",
        r"[0-9]",
        r"[a-z_]",
        r"[.k]",
        r".*",
        r".+",
        r".?",
        r"1?",
        r"\d+",
        r"\d*",
        r"[01]+",
        r"(q|k)",
        r"(?:gate|up)",
        r"(a|)",
        r"(",
        r")",
        r"|",
        r"^",
        r"$",
        r".*?",
    ],
]


def of_peft(patterns: list[str], path: str) -> str | None:
    key = get_pattern_key(patterns, path)
    return key if key in patterns else None


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "self_attn?q_proj",
        "layers.1.mlp.up_proj",
        "^model.layers.1.mlp.up_proj",
        "^layers.1.mlp.up_proj",
        r"layers\.1[01]\.mlp\.up_proj$",
        r"model\.layers\.(?:0|10)\.self_attn\.(?:q|k|v)_proj",
        ".*q_proj",
        ".*",
        "layers.1.*",
        r".*\.\d+\.mlp\.\w+_proj",
        "q_proj|k_proj",
        "^model.layers.0.*|^model.layers.1.*",
        "",
    ],
)
def test_common_patterns_match_as_in_peft(pattern: str) -> None:
    patterns = ModulePatterns([pattern])

    assert [patterns.first(path) for path in PATHS] == [of_peft([pattern], path) for path in PATHS]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), min_size=1, max_size=3))
def test_random_patterns_match_as_in_peft_or_are_refused(texts: list[str]) -> None:
    try:
        patterns = ModulePatterns(texts)
    except UnsupportedAdapter:
        return
    for text in texts:
        re.compile(text)  # what we take, peft can take

    assert [patterns.first(path) for path in PATHS] == [of_peft(texts, path) for path in PATHS]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a|b)*",
        "a{3}",
        "a**",
        r"\b",
        r"(a)\1",
        "(?=a)",
        "(?i)a",
        "(a",
        "a)",
        "[a",
        "[^a]",
        "a^b",
        "a$b",
        "\\",
        "*",
    ],
)
def test_patterns_outside_the_subset_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedAdapter):
        ModulePatterns([pattern])
