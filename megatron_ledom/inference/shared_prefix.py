"""What several sequences have in common at their beginning is read once.

The four options of a question under a forward model, or the demonstrations of a prompt in a reverse one: what is
conditioned on comes first in the model's order, so that it is the same prefix of ids. Its keys and values
are kept, copied for each continuation, and only the continuations are read:

    E g g g g a a        E g g g g          read once, its cache kept
    E g g g g b b b  ->    a a              read beside each other, behind copies of it
    E g g g g c            b b b
                           c                one token alone: predicted by the prefix, nothing to read

It owns when that pays and how it is done; which tokens are scored and the LM head are `scoring.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_ledom.direction import ConditionedIds

# Share of a group's tokens that must be saved: below it, batches of nearly equal length are as fast.
LEAST_SAVED = 0.25
# Keys and values of a copied prefix take less room than what a layer makes of a token that is read.
PREFIX_WEIGHT = 0.25


def find_groups(sequences: Sequence[ConditionedIds]) -> tuple[list[list[int]], list[int]]:
    """Divide sequences into groups whose prefix is worth sharing, and the others.

    Args:
        sequences: what to score.

    Returns:
        Groups of indices, the longest continuation first in each; and the indices of the rest.
    """
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prefix.setdefault(tuple(sequence.ids[: sequence.target_start]), []).append(index)
    groups, rest = [], []
    for prefix, indices in by_prefix.items():
        num_tokens = sum(len(sequences[index].ids) for index in indices)
        if (len(indices) - 1) * len(prefix) >= LEAST_SAVED * num_tokens:
            groups.append(sorted(indices, key=lambda i: -len(sequences[i].ids)))
        else:
            rest += indices
    return groups, sorted(rest)


def cut_group(sequences: Sequence[ConditionedIds], group: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut a group into batches within the budget, in which a token of the prefix counts `PREFIX_WEIGHT`."""
    prefix = sequences[group[0]].target_start
    batch: list[int] = []
    longest = 0
    for index in group:
        longest = longest or len(sequences[index].ids) - prefix
        if batch and (len(batch) + 1) * (longest + PREFIX_WEIGHT * prefix) > batch_tokens:
            yield batch
            batch, longest = [], len(sequences[index].ids) - prefix
        batch.append(index)
    yield batch


def can_share(model: Any) -> bool:
    """Whether copies of a prefix's cache give what reading all of it gives; tried with five ids.

    Models whose cache forgets (sliding windows, recurrent states) say no.
    """
    from transformers.cache_utils import DynamicLayer

    ids = torch.arange(5, device=model.device)[None, :]
    with torch.inference_mode():
        cache = _cache_of(model.base_model(input_ids=ids[:, :3], use_cache=True))
        if not all(type(layer) is DynamicLayer for each in cache.values() for layer in getattr(each, "layers", [None])):
            return False
        if not cache:
            return False
        after = continue_prefix(model, cache, ids[:, 3:].expand(2, -1))
        whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, 3:]
        return torch.allclose(after, whole.expand(2, -1, -1), rtol=1e-2, atol=1e-3)


def _cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, under the name that its version of transformers takes it by; {} without one."""
    for name in ("cache", "past_key_values"):  # the second is the older one, and asking for it warns
        if name in output and output[name] is not None:
            return {name: output[name]}
    return {}


def read_prefix(model: Any, ids: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
    """Read a prefix; returns its cache, by name, and the hidden state of its last id, [H]."""
    read = model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True)
    return _cache_of(read), read.last_hidden_state[0, -1]


def continue_prefix(model: Any, cache: dict[str, Any], ids_BT: torch.Tensor) -> torch.Tensor:
    """Read continuations behind a prefix, which is left as it is; returns the hidden states [B, T, H]."""
    own = copy.deepcopy(cache)
    for each in own.values():
        each.batch_repeat_interleave(ids_BT.shape[0])
    return model.base_model(input_ids=ids_BT, use_cache=True, **own).last_hidden_state
