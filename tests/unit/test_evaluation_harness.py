"""A reverse model in lm-evaluation-harness: real tasks over local JSONL, against sums made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from random_models import save_random_model

from megatron_ledom.errors import InputError, UsageError
from megatron_ledom.evaluation.harness import HarnessLM, format_results, run_harness
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.testing import english_documents

QUESTIONS = [
    {
        "question": f"The {word} statement",
        "options": [" is evaluated", " raises an exception", f" of {word}"],
        "label": n % 3,
    }
    for n, word in enumerate(("first", "second", "third", "fourth", "fifth"))
]
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
CHOICE = (
    DATA
    + """task: ledom_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
)
TEXT = (
    DATA
    + """task: ledom_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
)
LAST = (
    DATA
    + """task: ledom_last
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[0]}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""
)


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_random_model(folder / name, tokenizer_folder, name) for name in ("reverse", "forward")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    texts = [english_documents()[5][:1500], english_documents()[9][:200]]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "choice.yaml").write_text(CHOICE.format(path=folder / "choice.jsonl"))
    (folder / "last.yaml").write_text(LAST.format(path=folder / "choice.jsonl"))
    (folder / "text.yaml").write_text(TEXT.format(path=folder / "text.jsonl"))
    return folder


@pytest.mark.parametrize("reading", ["joint", "context", "reversed", "forward"])
def test_a_multiple_choice_task_is_ranked_as_the_reading_says(
    models: dict[str, Path], tasks: Path, reading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    is_forward = reading == "forward"
    folder = models["forward" if is_forward else "reverse"]
    asked = {} if is_forward else {"reading": reading}
    found = run_harness(folder, ["ledom_choice"], include_path=tasks, device="cpu", **asked)  # type: ignore[arg-type]
    forward, reverse = ForwardLM.load(models["forward"], device="cpu"), ReverseLM.load(models["reverse"], device="cpu")

    def score(question: str, option: str) -> float:
        if is_forward:
            return forward.logprob(option, question).logprob
        if reading == "reversed":
            return reverse.logprob(option, question).logprob
        of_context = reverse.logprob(question, option).logprob
        return of_context + (reverse.logprob(option, "").logprob if reading == "joint" else 0.0)

    chosen = [max(range(3), key=lambda n: score(q["question"], q["options"][n])) for q in QUESTIONS]  # type: ignore[index,arg-type]
    accuracy = sum(pick == q["label"] for pick, q in zip(chosen, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert found["results"]["ledom_choice"]["acc,none"] == pytest.approx(accuracy)
    assert (found["direction"], found["reading"]) == (str("forward" if is_forward else "reverse"), reading)
    assert "ledom_choice" in format_results(found)


def test_what_asks_for_greedy_writing_is_left_out_where_nobody_knows(
    models: dict[str, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for reading, is_known in (("joint", False), ("reversed", True)):
        found = run_harness(models["reverse"], ["ledom_last"], include_path=tasks, device="cpu", reading=reading)
        metrics = {name.partition(",")[0] for name in found["results"]["ledom_last"]}
        assert ("acc" in metrics) == is_known and "perplexity" in metrics
        assert found["left_out"] == ({} if is_known else {"ledom_last": "acc"})
        assert ("unknown under this reading" in format_results(found)) != is_known


def test_the_joint_is_the_probability_of_both_read_as_one(models: dict[str, Path]) -> None:
    reverse = ReverseLM.load(models["reverse"], device="cpu")
    requests = [SimpleNamespace(args=("The expression", " is evaluated"))]
    ((joint, _),) = HarnessLM(reverse).loglikelihood(requests)
    assert joint == pytest.approx(reverse.logprob("The expression is evaluated", "").logprob, rel=1e-6)


def test_bits_per_byte_of_long_texts(models: dict[str, Path], tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = run_harness(models["reverse"], ["ledom_text"], include_path=tasks, device="cpu")
    texts = [json.loads(line)["text"] for line in (tasks / "text.jsonl").read_text().splitlines()]
    reverse = ReverseLM.load(models["reverse"], device="cpu")
    bits = -sum(reverse.logprob(text, "", windowed=True).logprob for text in texts) / 0.6931471805599453
    expected = bits / sum(len(text.encode()) for text in texts)
    assert found["results"]["ledom_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-6)


def test_generation_writes_leftwards_up_to_the_nearest_stop(models: dict[str, Path]) -> None:
    reverse = ReverseLM.load(models["reverse"], device="cpu")
    whole = reverse.write_before(" is evaluated.", max_new_tokens=30, greedy=True)[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    request = SimpleNamespace(args=(" is evaluated.", {"until": [stop], "max_gen_toks": 30}))
    (found,) = HarnessLM(reverse, reading="reversed").generate_until([request])
    assert found == whole[whole.rindex(stop) + len(stop) :]
    with pytest.raises(UsageError, match="generates text after a context, which a reverse model under --reading joint"):
        HarnessLM(reverse).generate_until([request])


def test_what_cannot_be_answered_is_refused(models: dict[str, Path], tasks: Path) -> None:
    reverse = ReverseLM.load(models["reverse"], device="cpu")
    with pytest.raises(UsageError, match="--reading sideways"):
        HarnessLM(reverse, reading="sideways")
    with pytest.raises(InputError, match="request 0 of the harness: the text to be scored has no token"):
        HarnessLM(reverse).loglikelihood([SimpleNamespace(args=("a", ""))])
    with pytest.raises(InputError, match=r"request 0 of the harness: \d+ tokens with the boundary"):
        HarnessLM(reverse).loglikelihood([SimpleNamespace(args=("a", " b" * 400))])
    with pytest.raises(InputError, match="the harness knows no task absent"):
        run_harness(models["reverse"], ["absent"], include_path=tasks, device="cpu")
