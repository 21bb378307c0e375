"""Log-probabilities as serving engines write them: what is read, and what is refused and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import InputError
from megatron_ledom.rerank.candidates import read_questions
from megatron_ledom.rerank.carried import read_carried

# A chat completion and a completion as OpenAI's API documents them, and one of vLLM's CompletionOutput as JSON.
CHAT_CHOICE = {
    "index": 0,
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": "Hi there", "refusal": None},
    "logprobs": {
        "content": [
            {"token": "Hi", "logprob": -0.25, "bytes": [72, 105], "top_logprobs": [{"token": "Hi", "logprob": -0.25}]},
            {"token": " there", "logprob": -1.5, "bytes": [32, 116], "top_logprobs": []},
        ],
        "refusal": None,
    },
}
COMPLETION_CHOICE = {
    "text": " four",
    "index": 0,
    "finish_reason": "length",
    "logprobs": {
        "tokens": [" fo", "ur"],
        "token_logprobs": [-0.5, -0.125],
        "top_logprobs": [{" fo": -0.5}, {"ur": -0.125}],
        "text_offset": [10, 13],
    },
}
VLLM_OUTPUT = {
    "index": 0,
    "text": " four",
    "token_ids": [11, 12, 2],
    "cumulative_logprob": -0.875,
    "logprobs": [
        {"11": {"logprob": -0.5, "rank": 1, "decoded_token": " fo"}},
        {"12": {"logprob": -0.25, "rank": 1, "decoded_token": "ur"}},
        {"2": {"logprob": -0.125, "rank": 1, "decoded_token": ""}},
    ],
    "finish_reason": "stop",
    "stop_reason": None,
}


@pytest.mark.parametrize(
    ("fields", "logprob", "num_tokens"),
    [
        ({}, None, None),
        ({"forward_logprob": -3, "num_forward_tokens": 2}, -3.0, 2),
        ({"forward_logprob": -3, "num_forward_tokens": 2, "cumulative_logprob": -9.0}, -3.0, 2),
        ({"token_logprobs": [-1.0, -0.5]}, -1.5, 2),
        (CHAT_CHOICE, -1.75, 2),
        (COMPLETION_CHOICE, -0.625, 2),
        (VLLM_OUTPUT, -0.875, 3),
        ({**VLLM_OUTPUT, "logprobs": None}, -0.875, 3),
        ({**VLLM_OUTPUT, "cumulative_logprob": None}, -0.875, 3),
        ({"cumulative_logprob": -0.5}, -0.5, None),
        ({"cumulative_logprob": -0.5, "num_forward_tokens": 4}, -0.5, 4),
        ({"logprobs": [-0.5, -0.25]}, -0.75, 2),
        (
            # The chosen token beside a likelier one: vLLM with logprobs=1 and sampling.
            {"token_ids": [7], "logprobs": [{"9": {"logprob": -0.1}, "7": {"logprob": -3.0}}]},
            -3.0,
            1,
        ),
    ],
)
def test_every_shape_gives_its_sum_and_its_number_of_tokens(
    fields: dict[str, Any], logprob: float | None, num_tokens: int | None
) -> None:
    carried = read_carried(fields, "here")
    assert carried.logprob == (None if logprob is None else pytest.approx(logprob, abs=1e-15))
    assert carried.num_tokens == num_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_logprobs": []}, "here: token_logprobs is \\[\\]"),
        ({"token_logprobs": [None, -1.0]}, "begins with null, as where the engine repeats the prompt"),
        ({"token_logprobs": [-1.0, 0.5]}, "token_logprobs\\[1\\] is 0.5"),
        ({"logprobs": {"token_logprobs": [-1.0, -9999.0]}}, "whose probability they do not report"),
        ({"logprobs": {"top_logprobs": []}}, "neither vLLM's .* nor OpenAI's"),
        ({"logprobs": True}, "neither vLLM's .* nor OpenAI's"),
        ({"logprobs": {"content": [{"token": "a"}]}}, "one object with a 'logprob' for each token"),
        ({"logprobs": [{"7": {"logprob": -1.0}, "9": {"logprob": -2.0}}]}, "lists 2 tokens, and token_ids"),
        ({"logprobs": [{}]}, "logprobs\\[0\\] is {}"),
        ({"token_ids": [1, 2], "logprobs": [{"1": {"logprob": -1.0}}]}, "2 token_ids and 1 logprobs"),
        ({**VLLM_OUTPUT, "token_ids": [1]}, "token_ids and logprobs have \\[1, 3\\] entries"),
        ({"cumulative_logprob": float("-inf")}, "cumulative_logprob is -inf"),
        ({"logprobs": {"content": [{"logprob": None}]}}, "begins with null"),
    ],
)
def test_what_is_no_log_probability_of_the_answer_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_carried(fields, "here")


def test_responses_are_read_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    lines = [
        {"prompt": "2+2?", "request_id": "0", "outputs": [VLLM_OUTPUT]},
        {"question": "2+2?", "object": "text_completion", "choices": [COMPLETION_CHOICE]},
        {"question": "Hello", "object": "chat.completion", "choices": [CHAT_CHOICE, CHAT_CHOICE]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    vllm, completion, chat = read_questions(path)
    assert (vllm.text, vllm.candidates[0].text, vllm.candidates[0].forward_logprob) == ("2+2?", " four", -0.875)
    assert (completion.candidates[0].text, completion.candidates[0].num_forward_tokens) == (" four", 2)
    assert [c.text for c in chat.candidates] == ["Hi there", "Hi there"]
    assert "outputs" not in vllm.record
    assert vllm.record["request_id"] == "0"


def test_two_lists_of_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"question": "2+2?", "choices": [COMPLETION_CHOICE], "candidates": ["4"]}) + "\n")
    with pytest.raises(InputError, match="line 1: answers under 'candidates' and 'choices'"):
        read_questions(path)
