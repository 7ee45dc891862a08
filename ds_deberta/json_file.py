"""JSON files that people write: read whole, or refused with what is wrong."""

import json
from pathlib import Path
from typing import Any

MOST_LEVELS = 50
"""Of brackets in brackets. Python's own limit depends on what else is being done."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it is not JSON, or no object; a key stands twice in an object; or objects and
            lists are nested deeper than any setting needs.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise _too_deep(path) from None
    except _TwiceError as error:
        raise ValueError(f"{path} has the key {error} twice in one object; keep one") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(MOST_LEVELS + 1):
        if not level:
            return values
        level = [child for node in level for child in _children(node)]
    raise _too_deep(path)


class _TwiceError(Exception):
    """Names a key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(repr(key))
        found[key] = value
    return found


def _children(node: Any) -> list[Any]:
    children = node.values() if isinstance(node, dict) else node
    return [child for child in children if isinstance(child, dict | list)]


def _too_deep(path: Path) -> ValueError:
    return ValueError(
        f"{path} must have at most {MOST_LEVELS} levels of brackets in brackets; it has more. "
        "Remove what is nested so deeply."
    )
