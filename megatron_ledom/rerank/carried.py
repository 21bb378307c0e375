"""Forward log-probabilities that a candidate brings along, in the shapes in which serving engines write them.

    plain     {"forward_logprob": -6.2, "num_forward_tokens": 8}      what tools/rerank.py writes
              {"token_logprobs": [-0.1, -2.0, ...]}
    vLLM      {"cumulative_logprob": -6.2, "token_ids": [...], "logprobs": [{"123": {"logprob": -0.1}}, ...]}
    OpenAI    {"logprobs": {"tokens": [...], "token_logprobs": [-0.1, ...]}}                      completions
              {"logprobs": {"content": [{"token": "So", "logprob": -0.1}, ...]}}                  chat

The first of these that is there is taken, in this order. A sum is taken as the engine gave it: it may contain the
end-of-text token, where a model's own score here does not. Values that are no log-probabilities of the
answer's tokens are refused, never repaired. Everything is natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ledom.errors import InputError

FORWARD_LOGPROB = "forward_logprob"
NUM_FORWARD_TOKENS = "num_forward_tokens"
UNKNOWN_LOGPROB = -9999.0
"""What OpenAI-style servers write for a token whose probability they do not report."""


@dataclass(frozen=True)
class CarriedLogprob:
    """log P(answer given question) as it came with a candidate.

    Attributes:
        logprob: total, natural logarithm; None where nothing came.
        num_tokens: the number of tokens behind it; None where that is not said.
    """

    logprob: float | None = None
    num_tokens: int | None = None


def read_carried(fields: dict[str, Any], where: str) -> CarriedLogprob:
    """Find the log-probability in the fields of one candidate.

    Args:
        fields: the candidate's object.
        where: file, line and candidate, for messages.

    Raises:
        InputError: a value that can't be a log-probability, lengths that contradict each other, or a
            shape under "logprobs" that is none of those above.

    >>> read_carried({"cumulative_logprob": -1.5, "token_ids": [5, 7, 2]}, "here")
    CarriedLogprob(logprob=-1.5, num_tokens=3)
    >>> read_carried({"logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0}]}}, "here")
    CarriedLogprob(logprob=-1.5, num_tokens=2)
    """
    count = _read_count(fields.get(NUM_FORWARD_TOKENS), NUM_FORWARD_TOKENS, where)
    if fields.get(FORWARD_LOGPROB) is not None:
        return CarriedLogprob(_read_logprob(fields[FORWARD_LOGPROB], FORWARD_LOGPROB, where), count)
    if fields.get("token_logprobs") is not None:
        return _sum(fields["token_logprobs"], "token_logprobs", where)
    if fields.get("cumulative_logprob") is not None:
        total = _read_logprob(fields["cumulative_logprob"], "cumulative_logprob", where)
        return CarriedLogprob(total, _count_vllm_tokens(fields, where) or count)
    logprobs = fields.get("logprobs")
    if logprobs is None:
        return CarriedLogprob(None, count)
    if isinstance(logprobs, list):
        return _sum(_pick_vllm(logprobs, fields.get("token_ids"), where), "logprobs", where)
    if isinstance(logprobs, dict) and logprobs.get("content") is not None:
        return _sum(_pick_chat(logprobs["content"], where), "logprobs.content", where)
    if isinstance(logprobs, dict) and logprobs.get("token_logprobs") is not None:
        return _sum(logprobs["token_logprobs"], "logprobs.token_logprobs", where)
    raise InputError(
        f"{where}: 'logprobs' is neither vLLM's (a list with one object a token) nor OpenAI's (an object with "
        "'token_logprobs' or 'content'). See docs/reverse_reward.md, or give forward_logprob"
    )


def _sum(values: object, name: str, where: str) -> CarriedLogprob:
    """Add up one number per token."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise InputError(f"{where}: {name} is {values!r}, a list with one number a token is needed")
    if values[0] is None:
        raise InputError(
            f"{where}: {name} begins with null, as where the engine repeats the prompt (echo). Ask it for the "
            "answer's tokens alone"
        )
    numbers = [_read_logprob(value, f"{name}[{index}]", where) for index, value in enumerate(values)]
    return CarriedLogprob(math.fsum(numbers), len(numbers))


def _pick_chat(content: object, where: str) -> list[object]:
    """The numbers of OpenAI's chat completions."""
    if not isinstance(content, list) or not all(isinstance(entry, dict) and "logprob" in entry for entry in content):
        raise InputError(f"{where}: logprobs.content needs one object with a 'logprob' for each token")
    return [entry["logprob"] for entry in content]


def _pick_vllm(logprobs: list[Any], token_ids: object, where: str) -> list[object]:
    """The chosen token's number among those that vLLM lists at each place."""
    picked: list[object] = []
    for place, entry in enumerate(logprobs):
        if isinstance(entry, (int, float)):  # written by hand from vLLM's objects: plain numbers
            picked.append(entry)
            continue
        if not isinstance(entry, dict) or not entry:
            raise InputError(f"{where}: logprobs[{place}] is {entry!r}; vLLM has an object from token id to logprob")
        chosen = next(iter(entry.values())) if len(entry) == 1 else _find_token(entry, token_ids, place, where)
        picked.append(chosen.get("logprob") if isinstance(chosen, dict) else chosen)
    if isinstance(token_ids, list) and len(token_ids) != len(picked):
        raise InputError(f"{where}: {len(token_ids)} token_ids and {len(picked)} logprobs. One each is needed")
    return picked


def _find_token(entry: dict[str, Any], token_ids: object, place: int, where: str) -> Any:
    """The entry of the token that was chosen, where several are listed."""
    if isinstance(token_ids, list) and place < len(token_ids) and str(token_ids[place]) in entry:
        return entry[str(token_ids[place])]
    raise InputError(
        f"{where}: logprobs[{place}] lists {len(entry)} tokens, and token_ids does not say which of them was chosen. "
        "Add vLLM's token_ids, or its cumulative_logprob"
    )


def _count_vllm_tokens(fields: dict[str, Any], where: str) -> int | None:
    lengths = {len(fields[key]) for key in ("token_ids", "logprobs") if isinstance(fields.get(key), list)}
    if len(lengths) > 1:
        raise InputError(f"{where}: token_ids and logprobs have {sorted(lengths)} entries. One each is needed")
    return next(iter(lengths), None) or None


def _read_logprob(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value > 0:
        raise InputError(f"{where}: {name} is {value!r}, a finite number of at most 0 is needed")
    if value == UNKNOWN_LOGPROB:
        raise InputError(
            f"{where}: {name} is {value!r}, which servers write for a token whose probability they do not report. "
            "Ask for the chosen tokens' log-probabilities, or remove the field and score with --forward-model"
        )
    return float(value)


def _read_count(value: object, name: str, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {name} is {value!r}, a whole number of at least 1 is needed")
    return value
