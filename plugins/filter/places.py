"""Filter for numbered parameters of a stack, such as AdminArn1 to AdminArn3."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def keep_places(wanted: Sequence[str], before: Sequence[str]) -> list[str]:
    """Return as many values as ``before``; those of ``wanted`` that were there keep their places.

    New values take the free places; a place that stays free is an empty string.

    CloudFormation creates the replacement of a resource before it deletes the old one. So a value
    that may exist only once cannot move to another resource of the stack.
    """
    kept = [value if value in wanted else "" for value in before]
    new = [value for value in dict.fromkeys(wanted) if value not in kept]
    return [value or (new.pop(0) if new else "") for value in kept]


class FilterModule:
    """Filter ``keep_places``."""

    def filters(self) -> dict[str, Callable[[Sequence[str], Sequence[str]], list[str]]]:
        """Return the filter by name."""
        return {"keep_places": keep_places}
