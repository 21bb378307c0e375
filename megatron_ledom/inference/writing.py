"""Growing a sequence of ids with `transformers`' generate, its KV cache and its samplers.

It only sees ids in the model's order; `model.py` says what they mean, `sampling.py` holds
the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_ledom.inference.sampling import Sampling


def write_ids(
    model: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    *,
    look: Callable[[list[tuple[list[int], bool]]], list[bool]] | None = None,
) -> list[tuple[list[int], bool]]:
    """Continue `prompt` (ids in the model's order).

    Args:
        model: a `transformers` causal LM.
        prompt: what the model reads first; [n], n >= 1.
        sampling: how to choose tokens. Torch's global random state is left as it was.
        stop_ids: writing ends with any of these.
        look: called after each token with what will be returned, as far as it is written; says which samples end there.

    Returns:
        Per sample: the new ids, without the stop id, and whether a stop id was written.
    """
    from transformers import GenerationConfig

    # A folder's generation_config.json fills in whatever is left unset here, so every
    # setting that it commonly holds is set.
    chosen: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}
    if not sampling.greedy:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
    config = GenerationConfig(
        **chosen,
        max_new_tokens=sampling.max_new_tokens,
        min_length=0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=sampling.num_samples,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )
    ids = torch.tensor([list(prompt)], device=model.device)

    ended: dict[int, list[int]] = {}  # samples that `look` has ended; what follows in their rows is padding

    def so_far(grown: torch.Tensor) -> list[tuple[list[int], bool]]:
        rows = [_cut_at_stop(row, stop_ids) for row in grown[:, len(prompt) :].tolist()]
        return [(ended[number], False) if number in ended else row for number, row in enumerate(rows)]

    def watch(grown: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        assert look is not None
        now = so_far(grown)
        for number, is_over in enumerate(look(now)):
            if is_over and number not in ended and not now[number][1]:
                ended[number] = now[number][0]
        return torch.tensor([number in ended for number in range(len(now))], device=grown.device)

    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(sampling.seed)
        grown = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=[] if look is None else [watch],
        )
    return so_far(grown)


def _cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first stop id, and whether there was one (what follows it is padding).

    >>> _cut_at_stop([7, 8, 0, 0], [0])
    ([7, 8], True)
    """
    for index, token in enumerate(ids):
        if token in stop_ids:
            return ids[:index], True
    return ids, False
