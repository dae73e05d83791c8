"""The patterns of strangers: the answers of `re` where that ends, and an end where it has none."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.interop._patterns import LIMIT, compile_pattern

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c.]", "$", "^", "-", "]", "{"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(
            st.sampled_from(["({})", "(?:{})"]), inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}"])
        ).map(lambda parts: parts[0].format(parts[1]) + parts[2]),
    ),
    max_leaves=6,
)


@settings(max_examples=400)
@given(PATTERNS, st.text(st.sampled_from("ab.1\n-c"), max_size=9))
def test_the_answers_of_re(pattern, text):
    try:
        matches = compile_pattern(pattern)
    except ValueError as error:
        assert "deep" in str(error)  # noqa: PT017
        return
    assert matches(text) == (re.match(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a*)*$", "(a|a)*$", "(a|aa)+$", "(.*a){20}$", "(a?){50}a{50}$", "a?" * 60 + "b", ".*" * 100 + "x"),
        *("(a|a)" * 90 + "b", "((a|b|ab)*c?)*$", "(x+x+)+y", "(?:.*.*)*=.*$"),
    ],
)
def test_bombs_end(pattern):
    """`re` would take from minutes to the age of the universe for these; time of this process alone is counted."""
    start = time.process_time()
    assert not compile_pattern(pattern)("a" * (LIMIT - 1) + "!")
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        *((("(" * n + "a" + ")*" * n), "more than 2 deep") for n in (3, 4, 30)),
        *(
            (pattern, "is not accepted")
            for pattern in (r"(a)\1", "(?=a)", "(?!a)", "(?i)a", r"a\b", "a**", "*a", "a++")
        ),
        *((pattern, "without its|too many|not accepted") for pattern in ("(a", "a)", "[a", "a\\")),
        ("[b-a]", "bad character range"),
        ("a{5000}", "up to 100"),
        ("a{3,2}", "up to 100"),
        ("a" * 600, "600 characters"),
        ("(" * 400, "32 groups inside"),
    ],
)
def test_refusals_are_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        compile_pattern(pattern)
    with pytest.raises(ValueError, match="a name of 513"):
        compile_pattern("a")("a" * 513)
