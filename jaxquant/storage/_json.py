"""JSON files, which may be anyone's, read with limits."""

import json
import math
import pathlib
from typing import Any

SIZE_LIMIT = 32_000_000


def read_json(file: pathlib.Path, content: bytes | None = None, *, size_limit: int = SIZE_LIMIT) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        file: the file, also named in errors.
        content: its bytes, where they are part of a file only.
        size_limit: bytes that are accepted of a whole file.

    Returns:
        The object.

    Raises:
        ValueError: the text is too large, nested too deep, no JSON, names a key twice, holds a number that is not
            finite, or is no object.
    """
    if content is None:
        if file.stat().st_size > size_limit:
            raise ValueError(f"{file}: {file.stat().st_size} bytes of JSON; at most {size_limit} are accepted")
        content = file.read_bytes()
    try:
        parsed = json.loads(content, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no readable JSON: {str(error)[:200]}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: a JSON object was expected, got {type(parsed).__name__}")
    return parsed


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return made
