"""Log-probabilities of chosen tokens under a causal language model, in batches.

Owns five economies, none of which changes a result:

- A sequence that occurs several times is scored once: samples of one question often
  repeat, and equal candidates get exactly equal scores.
- Only the hidden states that predict a scored token go through the LM head, and
  these in chunks, so that no tensor of vocabulary x length exists.
- Sequences are sorted by length and padded on the right to the longest of their
  batch. Under a causal mask a real token never sees padding, so no mask is passed.
- The last id of a sequence is only predicted, never read.
- What several sequences condition on is read once (`shared_prefix.py`).

It doesn't know texts, tokenizers or which way the ids run (`model.py` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megatron_ledom.direction import ConditionedIds
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.shared_prefix import can_share, continue_prefix, cut_group, find_groups, read_prefix

# 16 MiB of float32 logits at a time on a CPU: 85 positions at a vocabulary of 49,152. With 64 MiB, head and softmax of
# a network of width 128 took half as long again (they fall out of the cache), of width 576 the same; with 4 MiB, where
# the matrix product is starved, 1.2 and 2.3 times as long. On a GPU 256 MiB: there it is launches that cost.
LOGITS_PER_CHUNK = 1 << 22
GPU_CHUNKS = 16


class ScoredTarget(NamedTuple):
    """Natural log-probabilities of a target's tokens, model order, and whether each was the likeliest in its place."""

    logprobs: list[float]
    is_greedy: bool


def build_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group sequences of similar length, the longest first.

    Args:
        lengths: number of ids per sequence.
        batch_tokens: most tokens in a batch, padding included; a longer sequence has a batch of its own.

    Yields:
        Indices into `lengths`; every index once.

    >>> list(build_batches([2, 9, 3, 3], batch_tokens=6))
    [[1], [2, 3], [0]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pick_log_softmax(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural log-probability of one target per row of logits, and whether it is the likeliest; overwrites the logits.

    The exponentials are summed in the logits' own dtype (relative error 1e-7 in
    float32); everything of the size of a logit is then added in float64, so that the
    sum over a long text doesn't drift.

    Args:
        logits_NV: float32 or float64 [N, V].
        targets_N: int64 [N].

    Returns:
        float64 [N] and bool [N].
    """
    peak_N1 = logits_NV.amax(dim=-1, keepdim=True)
    picked_N = logits_NV.gather(-1, targets_N[:, None])[:, 0].double() - peak_N1[:, 0].double()
    return picked_N - logits_NV.sub_(peak_N1).exp_().sum(dim=-1).double().log(), picked_N == 0


def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are its output embedding applied to its last hidden state, and nothing else.

    Found by trying three ids both ways. Models that scale or cap their logits say no;
    they are scored through their own forward function, with more memory.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(3, device=model.device)[None, :]
    with torch.inference_mode():
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        return hidden is not None and torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


class TokenScorer:
    """Scores token sequences under one Hugging Face causal language model.

    Args:
        model: a loaded `transformers` causal LM in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.plain_head = has_plain_head(model)
        self.shares = self.plain_head and can_share(model)

    @torch.inference_mode()
    def score(
        self,
        sequences: Sequence[ConditionedIds],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[ScoredTarget]:
        """Log-probability of every target token of every sequence.

        Args:
            sequences: ids in the model's order; each target starts at index 1 or later.
            batch_tokens: most tokens in a batch, padding included.
            on_batch: called after each batch with the number of sequences that it settled.

        Returns:
            One per sequence, in the order given.
        """
        copies: dict[tuple[int, ...], list[int]] = {}
        for index, sequence in enumerate(sequences):
            copies.setdefault((sequence.target_start, *sequence.ids), []).append(index)
        places = list(copies.values())
        distinct = [sequences[each[0]] for each in places]
        results = [ScoredTarget([], True)] * len(sequences)
        for batch, scores in self._score_all(distinct, batch_tokens):
            start = 0
            for i in batch:
                end = start + len(distinct[i].ids) - distinct[i].target_start
                target = ScoredTarget([value for value, _ in scores[start:end]], all(p for _, p in scores[start:end]))
                for index in places[i]:
                    results[index] = target
                start = end
            if on_batch is not None:
                on_batch(sum(len(places[i]) for i in batch))
        return results

    def _score_all(
        self, sequences: Sequence[ConditionedIds], batch_tokens: int
    ) -> Iterator[tuple[list[int], list[tuple[float, bool]]]]:
        """Yield batches of indices, and what `_score_rows` gives of their targets, one sequence after the other."""
        groups, rest = find_groups(sequences) if self.shares else ([], list(range(len(sequences))))
        for batch in build_batches([len(sequences[i].ids) - 1 for i in rest], batch_tokens):
            chosen = [rest[i] for i in batch]
            yield chosen, self._score_batch([sequences[i] for i in chosen])
        for group in groups:
            first = sequences[group[0]]
            cache, last_H = read_prefix(self.model, first.ids[: first.target_start])
            for chosen in cut_group(sequences, group, batch_tokens):
                yield chosen, self._score_behind(cache, last_H, [sequences[i] for i in chosen])

    def _score_batch(self, sequences: Sequence[ConditionedIds]) -> list[tuple[float, bool]]:
        """Scores of all target tokens of one batch, one sequence after the other."""
        ids = self._padded([s.ids[:-1] for s in sequences])
        # The token at index t is predicted from position t - 1.
        places = [(row, t - 1) for row, s in enumerate(sequences) for t in range(s.target_start, len(s.ids))]
        rows_N, positions_N = torch.tensor(places, device=ids.device).unbind(-1)
        targets_N = self._targets(sequences)
        if not self.plain_head:
            logits = self.model(input_ids=ids, use_cache=False).logits
            return _score_rows(logits[rows_N, positions_N], targets_N, lambda chunk: chunk, logits.shape[-1])
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self._score_states(hidden[rows_N, positions_N], targets_N)

    def _score_behind(
        self, cache: dict[str, Any], last_H: torch.Tensor, sequences: Sequence[ConditionedIds]
    ) -> list[tuple[float, bool]]:
        """The same for sequences that begin with one prefix, which has been read."""
        read = [s.ids[s.target_start : -1] for s in sequences]
        states = [last_H[None].expand(len(sequences), 1, -1)]
        if any(read):
            states.append(continue_prefix(self.model, cache, self._padded(read)))
        states_BTH = torch.cat(states, dim=1)
        rows_NH = torch.cat([states_BTH[row, : len(ids) + 1] for row, ids in enumerate(read)])
        return self._score_states(rows_NH, self._targets(sequences))

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.long)
        return ids.to(self.model.device)

    def _targets(self, sequences: Sequence[ConditionedIds]) -> torch.Tensor:
        return torch.tensor([i for s in sequences for i in s.ids[s.target_start :]], device=self.model.device)

    def _score_states(self, states_NH: torch.Tensor, targets_N: torch.Tensor) -> list[tuple[float, bool]]:
        head = self.model.get_output_embeddings()
        return _score_rows(states_NH, targets_N, head, head.weight.shape[0])


def _score_rows(
    states_NH: torch.Tensor, targets_N: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> list[tuple[float, bool]]:
    """Apply `head` to a few rows at a time; returns each target's log-probability, and whether it is the likeliest."""
    num_chunks = GPU_CHUNKS if states_NH.is_cuda else 1
    num_rows = max(1, num_chunks * LOGITS_PER_CHUNK // vocab_size)
    picked: list[tuple[float, bool]] = []
    for states, targets in zip(states_NH.split(num_rows), targets_N.split(num_rows), strict=True):
        logits = head(states)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        values, are_peaks = pick_log_softmax(logits, targets)
        picked += zip(values.tolist(), are_peaks.tolist(), strict=True)
    return picked
