"""Using a trained model: score a text given another, and write the text that comes before one.

`ReverseLM` and `ForwardLM` are loaded on first use: importing the package stays
free of torch, so that a tool can refuse bad input in a tenth of a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ledom.inference.model import DirectedLM, ForwardLM, ReverseLM, Score, load_lm

# Most tokens, padding included, that a model reads in one batch when scoring. On a CPU SmolLM2-135M took as long with
# 512 as with 1,024, up to a tenth longer with 2,048 and a third longer with 4,096: what a layer makes of so many falls
# out of the caches.
DEFAULT_BATCH_TOKENS = 1024

_LAZY = ("DirectedLM", "ForwardLM", "ReverseLM", "Score", "load_lm")
__all__ = ["DEFAULT_BATCH_TOKENS", "DirectedLM", "ForwardLM", "ReverseLM", "Score", "load_lm"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ledom.inference import model

    return getattr(model, name)
