"""Attributes of other people's modules, replaced for a time and put back."""

from __future__ import annotations

from typing import Any

Replaced = list[tuple[Any, str, Any]]
"""What was replaced: owner, name, and the original."""
_MISSING = object()


def replace(replaced: Replaced, owner: Any, name: str, value: Any) -> None:
    """Put `value` where `owner.name` is looked up, and note what was there in `replaced`."""
    replaced.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def put_back(replaced: Replaced) -> None:
    """Undo everything that `replaced` notes, the last replacement first."""
    while replaced:
        owner, name, original = replaced.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
