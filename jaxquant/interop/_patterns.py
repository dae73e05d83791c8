"""Regular expressions of strangers, matched in bounded time.

`re` tries alternatives one after the other, and a pattern such as `(a+)+$` in a downloaded config.json keeps it busy
for ever. Here all positions that a match may have reached are followed at once, as the bits of one integer, so that a
match takes at most len(pattern) * len(text)**2 steps, and REPEATS**2 times that where numbers of repetitions are given.

References:
    Thompson, "Regular expression search algorithm", 1968.
"""

import functools
import re
from collections.abc import Callable

Step = Callable[[str, int], int]  # (text, positions reached before as bits) -> positions reached after
LIMIT = 512  # characters of a pattern, and of a text
REPEATS = 100  # greatest number in {m,n}
GROUPS = 32  # inside each other
DEPTH = 2  # repetitions inside each other: each takes the time times len(text)
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?P<\w+>|\(\?|\{\d+(?:,\d*)?\}|.", re.DOTALL)
_CLASSES = "dDwWsS"


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    r"""Makes a function that tells whether a pattern matches the beginning of a text, as `re.match` does.

    Args:
        pattern: literals, `.`, classes, groups, `|`, `* + ?` and `{m,n}` (lazy or not), `^`, `$`, `\d \w \s`.

    Returns:
        The function.

    Raises:
        ValueError: the pattern is malformed, too long, repeats inside repetitions too deep, or uses something else.

    >>> matches = compile_pattern(r"model\.layers\.\d+\.(q|k)_proj$")
    >>> matches("model.layers.12.q_proj"), matches("model.layers.12.q_proj.x")
    (True, False)
    """
    if len(pattern) > LIMIT:
        raise ValueError(f"a pattern of {len(pattern)} characters; at most {LIMIT} are accepted")
    parser = _Parser(pattern)
    step, _ = parser.alternatives()
    if parser.tokens:
        raise ValueError(f"pattern {pattern!r}: a {parser.tokens[0]!r} too many")

    def matches(text: str) -> bool:
        if len(text) > LIMIT:
            raise ValueError(f"a name of {len(text)} characters, to be matched with {pattern!r}; at most {LIMIT}")
        return step(text, 1) != 0

    return matches


class _Parser:
    """Recursive descent; every method returns a step and how deep repetitions lie inside each other in it."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.tokens = _TOKEN.findall(pattern)
        self._open = 0

    def alternatives(self) -> tuple[Step, int]:
        branches = [self.sequence()]
        while self._next_is("|"):
            self.tokens.pop(0)
            branches.append(self.sequence())
        steps = [step for step, _ in branches]
        return (lambda text, at: functools.reduce(int.__or__, (step(text, at) for step in steps))), _depth(branches)

    def sequence(self) -> tuple[Step, int]:
        parts = []
        while self.tokens and self.tokens[0] not in "|)":
            parts.append(self.repeated())
        steps = [step for step, _ in parts]
        return (lambda text, at: functools.reduce(lambda at, step: step(text, at), steps, at)), _depth(parts)

    def repeated(self) -> tuple[Step, int]:
        step, depth = self.atom()
        if not self.tokens or not (self.tokens[0] in "*+?" or re.fullmatch(r"\{.+\}", self.tokens[0])):
            return step, depth
        quantifier = self.tokens.pop(0)
        if self._next_is("?"):  # lazy: another match first, but the same matches
            self.tokens.pop(0)
        if self.tokens and self.tokens[0] in "*+?":
            raise self._refusal(quantifier + self.tokens[0])
        if depth >= DEPTH:
            raise ValueError(f"pattern {self.pattern!r}: repetitions inside each other more than {DEPTH} deep")
        return _repeat(step, *self._bounds(quantifier)), depth + 1

    def atom(self) -> tuple[Step, int]:
        token = self.tokens.pop(0)
        if token == "(" or token == "(?:" or token.startswith("(?P<"):
            return self.group()
        if token == "^":
            return (lambda text, at: at & 1), 0
        if token == "$":
            return (lambda text, at: at & (1 << len(text) | (text.endswith("\n") << max(len(text) - 1, 0)))), 0
        escape = len(token) == 2 and token[0] == "\\"
        if token in ("(?", "[", "\\", *"*+?") or (escape and token[1].isalnum() and token[1] not in _CLASSES):
            raise self._refusal(token)
        return _one_character(token, self.pattern), 0

    def group(self) -> tuple[Step, int]:
        self._open += 1
        if self._open > GROUPS:
            raise ValueError(f"pattern {self.pattern!r}: more than {GROUPS} groups inside each other")
        inside = self.alternatives()
        if not self._next_is(")"):
            raise ValueError(f"pattern {self.pattern!r}: a group without its ')'")
        self.tokens.pop(0)
        self._open -= 1
        return inside

    def _bounds(self, quantifier: str) -> tuple[int, int | None]:
        if quantifier in "*+?":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[quantifier]
        least, comma, most = quantifier[1:-1].partition(",")
        bounds = int(least), (int(most) if most else None) if comma else int(least)
        if max(bounds[0], bounds[1] or 0) > REPEATS or (bounds[1] is not None and bounds[1] < bounds[0]):
            raise ValueError(f"pattern {self.pattern!r}: {quantifier}; numbers in order up to {REPEATS} are accepted")
        return bounds

    def _next_is(self, token: str) -> bool:
        return bool(self.tokens) and self.tokens[0] == token

    def _refusal(self, token: str) -> ValueError:
        return ValueError(f"pattern {self.pattern!r}: {token!r} is not accepted here; see compile_pattern")


def _depth(parts: list[tuple[Step, int]]) -> int:
    return max((depth for _, depth in parts), default=0)


def _one_character(token: str, pattern: str) -> Step:
    try:
        character = re.compile(token)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}") from error

    @functools.lru_cache(maxsize=1)
    def places(text: str) -> int:
        return sum(1 << place for place, letter in enumerate(text) if character.match(letter))

    return lambda text, at: (at & places(text)) << 1


def _repeat(step: Step, least: int, most: int | None) -> Step:
    def repeat(text: str, at: int) -> int:
        for _ in range(least):
            at = step(text, at)
        reached, rounds = at, least
        while at and (most is None or rounds < most):
            at, rounds = step(text, at) & ~reached, rounds + 1
            reached |= at
        return reached

    return repeat
