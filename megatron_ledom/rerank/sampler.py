"""Many continuations of many prompts under a forward model, in batches: the candidates that are reranked.

Growing, the KV cache and the choice of tokens are `transformers`' `generate`. This module owns
the batches (prompts of similar length, padded on the left), what ends a continuation, and the text
of what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_ledom.inference.sampling import Sampling
from megatron_ledom.rerank.generation import DEFAULT_BATCH_ROWS

if TYPE_CHECKING:
    from megatron_ledom.inference.model import ForwardLM


@dataclass(frozen=True)
class Continuation:
    """What was written after a prompt.

    Attributes:
        text: without the prompt; where `is_end` asked for it, up to the end that it found.
        num_tokens: how many were written.
        finished: the model ended the document; otherwise the token limit or `is_end` cut it off.
    """

    text: str
    num_tokens: int
    finished: bool


def continue_texts(
    lm: ForwardLM,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    find_end: Callable[[str], int | None] | None = None,
    batch_rows: int = DEFAULT_BATCH_ROWS,
    on_batch: Callable[[int], None] | None = None,
    what: Callable[[int], str] = "prompt {}".format,
) -> list[list[Continuation]]:
    """Write `sampling.num_samples` continuations of every prompt.

    Args:
        lm: the model.
        prompts: texts; each is read after the boundary, as in `ForwardLM.arrange`.
        sampling: how tokens are chosen. The seed, the prompts and `batch_rows` together fix the samples.
        find_end: given the text written so far, the character at which it is complete, or None.
            A row that is complete grows no further, and its text is cut there.
        batch_rows: most continuations in a batch.
        on_batch: called after each batch with the number of continuations that it settled.
        what: names prompt number i in an error.

    Returns:
        Per prompt, in the order given: its continuations.

    Raises:
        InputError: a prompt and the new tokens asked for are longer than the context.
    """
    encoded = encode_prompts(lm, prompts, sampling, what=what)
    rows = [index for index in range(len(prompts)) for _ in range(sampling.num_samples)]
    rows.sort(key=lambda index: len(encoded[index]))  # stable: the samples of a prompt stay together
    results: list[list[Continuation]] = [[] for _ in prompts]
    devices = [lm.model.device] if lm.model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        for start in range(0, len(rows), batch_rows):
            batch = rows[start : start + batch_rows]
            for index, continuation in zip(batch, _grow(lm, batch, encoded, sampling, find_end), strict=True):
                results[index].append(continuation)
            if on_batch is not None:
                on_batch(len(batch))
    return results


def encode_prompts(
    lm: ForwardLM, prompts: Sequence[str], sampling: Sampling, *, what: Callable[[int], str] = "prompt {}".format
) -> list[list[int]]:
    """Return the ids of every prompt after the boundary.

    Raises:
        InputError: a prompt and the new tokens asked for are longer than the context; `what` names it.
    """
    encoded = [[lm.boundary_id, *lm.encode(prompt)] for prompt in prompts]
    for index, ids in enumerate(encoded):
        lm.check_length(len(ids) + sampling.max_new_tokens, f"{what(index)} and {sampling.max_new_tokens} new tokens")
    return encoded


def _grow(
    lm: ForwardLM,
    batch: Sequence[int],
    encoded: Sequence[list[int]],
    sampling: Sampling,
    find_end: Callable[[str], int | None] | None,
) -> list[Continuation]:
    """Continue one batch of prompts, given by their numbers; torch's random state decides the draws."""
    longest = max(len(encoded[index]) for index in batch)
    stop_ids = _stop_ids(lm)
    ids_BS = torch.full((len(batch), longest), stop_ids[0])
    mask_BS = torch.zeros_like(ids_BS)
    for row, index in enumerate(batch):  # on the left, so that all rows write at the same place
        ids_BS[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index])
        mask_BS[row, longest - len(encoded[index]) :] = 1
    device = lm.model.device
    grown = lm.model.generate(
        input_ids=ids_BS.to(device),
        attention_mask=mask_BS.to(device),
        generation_config=_generation_config(sampling, stop_ids),
        stopping_criteria=None if find_end is None else [_EndFinder(lm, longest, stop_ids, find_end)],
    )
    return [
        _read_row(lm, encoded[index], new_ids, stop_ids, find_end)
        for index, new_ids in zip(batch, grown[:, longest:].tolist(), strict=True)
    ]


def _stop_ids(lm: ForwardLM) -> list[int]:
    """Ids that end a document: the boundary of models made here, the end-of-text ids of others."""
    named = lm.model.generation_config.eos_token_id
    others = named if isinstance(named, list) else [named]
    found = {lm.boundary_id, lm.tokenizer.eos_token_id, *others}
    return sorted(i for i in found if i is not None)


def _generation_config(sampling: Sampling, stop_ids: Sequence[int]) -> Any:
    """The settings for `generate`; all that a folder's generation_config.json commonly holds is set."""
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if not sampling.greedy:
        chosen = {"do_sample": True, "temperature": sampling.temperature}
        chosen |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    return GenerationConfig(
        **chosen,
        max_new_tokens=sampling.max_new_tokens,
        min_length=0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=1,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )


def _text_after(lm: ForwardLM, prompt: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of `new_ids`, decoded after the prompt: at the seam a tokenizer may put a space, or join bytes."""
    before, whole = lm.decode(prompt[1:]), lm.decode([*prompt[1:], *new_ids])
    return whole.removeprefix(before) if whole.startswith(before) else lm.decode(new_ids)


def _read_row(
    lm: ForwardLM,
    prompt: Sequence[int],
    new_ids: list[int],
    stop_ids: Sequence[int],
    find_end: Callable[[str], int | None] | None,
) -> Continuation:
    """What one row wrote; what follows its stop id is padding."""
    end = next((place for place, token in enumerate(new_ids) if token in stop_ids), None)
    written = new_ids[:end]
    text = _text_after(lm, prompt, written)
    cut = None if find_end is None else find_end(text)
    if cut is not None:  # then generate filled the row up with a stop id that the model did not write
        return Continuation(text[:cut], len(written), finished=False)
    return Continuation(text, len(written), finished=end is not None)


class _EndFinder:
    """Stopping criterion of `generate`: per row, whether the text written so far is complete."""

    def __init__(
        self, lm: ForwardLM, num_prompt_tokens: int, stop_ids: Sequence[int], find_end: Callable[[str], int | None]
    ) -> None:
        self._lm, self._start, self._stop_ids, self._find_end = lm, num_prompt_tokens, set(stop_ids), find_end
        self._is_done: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return bool [batch]; True ends a row."""
        rows = input_ids[:, self._start :].tolist()
        self._is_done = self._is_done or [False] * len(rows)
        for number, row in enumerate(rows):
            if not self._is_done[number]:
                self._is_done[number] = self._find_end(self._lm.decode(row)) is not None
        return torch.tensor(self._is_done, device=input_ids.device)
