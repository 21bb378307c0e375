"""Growing a sequence of ids with `transformers`' generate, its KV cache and its samplers.

It only sees ids in the model's order; `model.py` says what they mean, `sampling.py` holds
the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_ledom.inference.sampling import Sampling


def write_ids(
    model: Any, prompt: Sequence[int], sampling: Sampling, stop_ids: Sequence[int]
) -> list[tuple[list[int], bool]]:
    """Continue `prompt` (ids in the model's order).

    Args:
        model: a `transformers` causal LM.
        prompt: what the model reads first; [n], n >= 1.
        sampling: how to choose tokens. Torch's global random state is left as it was.
        stop_ids: writing ends with any of these.

    Returns:
        Per sample: the new ids, without the stop id, and whether a stop id was written.
    """
    from transformers import GenerationConfig

    # A folder's generation_config.json fills in whatever is left unset here, so every
    # setting that it commonly holds is set.
    chosen: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if not sampling.greedy:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    config = GenerationConfig(
        **chosen,
        max_new_tokens=sampling.max_new_tokens,
        min_length=0,
        num_beams=1,
        min_p=0.0 if chosen["do_sample"] else None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_return_sequences=sampling.num_samples,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(sampling.seed)
        grown = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [_cut_at_stop(row, stop_ids) for row in grown[:, len(prompt) :].tolist()]


def _cut_at_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first stop id, and whether there was one (what follows it is padding).

    >>> _cut_at_stop([7, 8, 0, 0], [0])
    ([7, 8], True)
    """
    for index, token in enumerate(ids):
        if token in stop_ids:
            return ids[:index], True
    return ids, False
