"""Scoring a file: what is written, what is kept, and that a killed job goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import edit_config, random_pairs, save_random_model

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DirectionError, InputError, OutputExistsError, UsageError
from megatron_ledom.inference import DirectedLM, ForwardLM, ReverseLM, score_file
from megatron_ledom.inference.folder import load_record
from megatron_ledom.inference.score_cache import ScoreCache, model_identity
from megatron_ledom.inference.score_file import ScoreSettings
from megatron_ledom.testing import english_documents

PAIRS = random_pairs(english_documents(), 30)
Score = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_random_model(folder / name, tokenizer_folder, name) for name in ("reverse", "forward")}


def write(path: Path, pairs: list[tuple[str, str]], **more: Any) -> Path:
    lines = [{"id": n, "earlier": a, "later": b, **more} for n, (a, b) in enumerate(pairs)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings(model: Path, tmp_path: Path, **changes: Any) -> ScoreSettings:
    return replace(ScoreSettings(model, device="cpu", cache=tmp_path / "cache"), **changes)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_lines_come_back_with_the_score_of_what_the_model_writes(
    models: dict[str, Path], tmp_path: Path, direction: str
) -> None:
    given = settings(models[direction], tmp_path, separator="\n", with_tokens=True, closed=True)
    source, output = write(tmp_path / "in.jsonl", PAIRS), tmp_path / "out.jsonl"
    counts = score_file.score_file(source, output, given)
    assert (counts.num_pairs, counts.num_known, counts.direction) == (len(PAIRS), 0, direction)
    lm: DirectedLM
    if direction == "reverse":
        lm = ReverseLM.load(models[direction], device="cpu")
        expected = lm.logprobs([(earlier, "\n" + later) for earlier, later in PAIRS], closed=True)
    else:
        lm = ForwardLM.load(models[direction], device="cpu")
        expected = lm.logprobs([(later, earlier + "\n") for earlier, later in PAIRS], closed=True)
    for number, (line, score) in enumerate(zip(read(output), expected, strict=True)):
        assert line["id"] == number
        assert line["score"]["logprob"] == pytest.approx(score.logprob, rel=1e-9)
        assert line["score"]["token_logprobs"] == list(score.token_logprobs)
        assert (line["score"]["num_tokens"], line["score"]["direction"]) == (score.num_tokens, direction)


def test_a_killed_job_goes_on_with_what_it_has(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_file, "BATCHES_PER_BLOCK", 1)
    given = settings(models["reverse"], tmp_path, batch_tokens=200)
    source, output = write(tmp_path / "in.jsonl", PAIRS), tmp_path / "out.jsonl"
    whole = DirectedLM.score

    class KilledError(Exception):
        pass

    blocks = []

    def dies_at_the_fourth(self: DirectedLM, layouts: Any, **more: Any) -> Any:
        blocks.append(len(layouts))
        if len(blocks) == 4:
            raise KilledError
        return whole(self, layouts, **more)

    monkeypatch.setattr(DirectedLM, "score", dies_at_the_fourth)
    with pytest.raises(KilledError):
        score_file.score_file(source, output, given)
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in.jsonl"]
    monkeypatch.setattr(DirectedLM, "score", whole)
    counts = score_file.score_file(source, output, given)
    assert counts.num_known == sum(blocks[:3]) > 0
    monkeypatch.undo()
    score_file.score_file(source, tmp_path / "at_once.jsonl", replace(given, cache=None))
    for line, other in zip(read(output), read(tmp_path / "at_once.jsonl"), strict=True):
        assert line["score"]["logprob"] == pytest.approx(other["score"]["logprob"], rel=1e-6)


def test_the_cache_knows_model_direction_texts_and_layout(models: dict[str, Path], tmp_path: Path) -> None:
    given = settings(models["reverse"], tmp_path)
    source, output = write(tmp_path / "in.jsonl", PAIRS[:4]), tmp_path / "out.jsonl"

    def known(changed: ScoreSettings, path: Path = source) -> int:
        return score_file.score_file(path, output, changed, overwrite=True).num_known

    assert known(given) == 0
    assert known(given) == 4
    assert known(replace(given, batch_tokens=64)) == 4
    shuffled = write(tmp_path / "other.jsonl", [PAIRS[9], *PAIRS[3::-1]])
    assert known(given, shuffled) == 4
    assert known(replace(given, separator="\n")) == 0
    assert known(replace(given, closed=True)) == 0
    assert known(replace(given, dtype="float64")) == 0
    assert known(replace(given, model=models["forward"])) == 0
    copy = shutil.copytree(models["reverse"], tmp_path / "moved" / "copy")
    assert known(replace(given, model=copy)) == 4
    edit_config(copy, rms_norm_eps=1e-3)
    assert known(replace(given, model=copy)) == 0
    retrained = save_random_model(tmp_path / "retrained", copy, "reverse", seed=9)
    assert model_identity(retrained) != model_identity(models["reverse"])


def test_the_cache_knows_which_step_of_a_run_was_read(cases: Path, tmp_path: Path) -> None:
    """The same folder, whose tracker names another step."""
    run = shutil.copytree(cases / "tied", tmp_path / "run")
    (step,) = run.glob("iter_*")
    earlier = shutil.copytree(step, run / "iter_0000001")
    for file in earlier.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
    first = load_record(run).folder
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    second = load_record(run).folder
    assert (first.name, second.name) == (step.name, "iter_0000001")
    assert model_identity(first) == model_identity(step) != model_identity(second)


def test_a_score_that_is_no_number_is_an_error_and_is_not_kept(models: dict[str, Path], tmp_path: Path) -> None:
    lm = ReverseLM.load(models["reverse"], device="cpu")
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[3, 0] = float("nan")
    lm.model.save_pretrained(shutil.copytree(models["reverse"], tmp_path / "broken"))
    given = settings(tmp_path / "broken", tmp_path)
    with pytest.raises(InputError, match=r"broken gives nan as a log-probability in torch.float32"):
        score_file.score_file(write(tmp_path / "in.jsonl", PAIRS[:2]), tmp_path / "out.jsonl", given)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a database, and long enough to be looked at " * 30)
    with pytest.raises(InputError, match=r"--cache .*cache cannot be used: file is not a database"):
        ScoreCache(tmp_path / "cache")


def test_pairs_longer_than_the_context(models: dict[str, Path], tmp_path: Path) -> None:
    text = english_documents()[5]
    source = write(tmp_path / "in.jsonl", [PAIRS[0], (text[:300], text[300:2000])])
    given = settings(models["reverse"], tmp_path)
    with pytest.raises(InputError, match=r"in.jsonl, line 2: \d+ tokens with the boundary, but .* at most 256"):
        score_file.score_file(source, tmp_path / "out.jsonl", given)
    assert not (tmp_path / "out.jsonl").exists()
    score_file.score_file(source, tmp_path / "out.jsonl", replace(given, windowed=True))
    first, second = (line["score"] for line in read(tmp_path / "out.jsonl"))
    assert first["num_windows"] == 1
    assert second["num_windows"] >= 1
    lm = ReverseLM.load(models["reverse"], device="cpu")
    assert second["logprob"] == pytest.approx(lm.logprob(text[:300], text[300:2000], windowed=True).logprob, rel=1e-9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"earlier": "a"}, r"line 2: no field 'later'; fields found: 'earlier'"),
        ({"earlier": "a", "later": " "}, r"line 2: field 'later' is empty"),
        ({"earlier": "", "later": "b"}, r"line 2: field 'earlier' is empty"),
        ({"earlier": 3, "later": "b"}, r"line 2: field 'earlier' is 3, a text is needed"),
        ({"earlier": "a", "later": "b", "score": 1}, r"line 2: field 'score' is there already. .*--field"),
    ],
)
def test_bad_lines_are_refused_before_the_model_is_loaded(
    tmp_path: Path, models: dict[str, Path], line: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", PAIRS[:1])
    source.write_text(source.read_text() + json.dumps(line) + "\n")
    broken = shutil.copytree(models["reverse"], tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        score_file.score_file(source, tmp_path / "out.jsonl", settings(broken, tmp_path))


def test_what_cannot_work_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    source, output = write(tmp_path / "in.jsonl", PAIRS[:1]), tmp_path / "out.jsonl"
    given = settings(models["forward"], tmp_path)
    with pytest.raises(DirectionError, match="is a forward model"):
        score_file.score_file(source, output, replace(given, assume_reverse=True))
    with pytest.raises(UsageError, match="--batch-tokens is 0"):
        score_file.score_file(source, output, replace(given, batch_tokens=0))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no pair"):
        score_file.score_file(tmp_path / "empty.jsonl", output, given)
    output.write_text("mine")
    with pytest.raises(OutputExistsError):
        score_file.score_file(source, output, given)
    assert output.read_text() == "mine"
    assert Direction.FORWARD is score_file.score_file(source, output, given, overwrite=True).direction
