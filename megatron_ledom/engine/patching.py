"""Attributes of other people's modules, replaced for a time and put back."""

from __future__ import annotations

from typing import Any

_MISSING = object()


class Patches:
    """What was replaced, so that `restore` can undo it."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Put `value` where `owner.name` is looked up."""
        self._replaced.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Put back everything, the last replacement first."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
