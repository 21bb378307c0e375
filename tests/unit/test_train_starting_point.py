"""The model of a checkpoint: taken when asked for, and never exchanged for another one without a word."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest

from megatron_ledom.checkpoint import Checkpoint
from megatron_ledom.errors import CheckpointError, UsageError
from megatron_ledom.train.starting_point import check_same_model, model_from_checkpoint, vocabulary_rows

FLAG = "--use-checkpoint-args"


def test_the_checkpoint_gives_the_whole_model(cases: Path) -> None:
    model = model_from_checkpoint([FLAG, "--pretrained-checkpoint", str(cases / "rope_llama3"), "--lr", "1e-3"])
    assert (model["use_rope_scaling"], model["rope_scaling_factor"], model["rotary_base"]) == (True, 8.0, 500_000)
    assert (model["hidden_size"], model["kv_channels"], model["num_query_groups"]) == (48, 12, 2)
    assert model["layernorm_epsilon"] == 1e-5 and model["seq_length"] == 256
    assert model["hidden_dropout"] == model["attention_dropout"] == 0.0  # Megatron's own default is 0.1
    linear = model_from_checkpoint([FLAG, "--load", str(cases / "rope_linear"), "--preset", "tiny"])
    assert linear["rotary_seq_len_interpolation_factor"] == 4 and "seq_length" not in linear


def test_a_run_that_has_checkpoints_goes_on_with_its_own(cases: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    arguments = [FLAG, "--run-dir", str(tmp_path / "run"), "--pretrained-checkpoint", str(cases / "mqa")]
    assert model_from_checkpoint(arguments)["num_query_groups"] == 1
    (tmp_path / "run" / "checkpoints").symlink_to(cases / "gqa_padded")
    assert model_from_checkpoint(arguments)["num_query_groups"] == 2


def test_without_the_flag_nothing_is_read_and_without_a_checkpoint_it_is_refused(tmp_path: Path) -> None:
    assert model_from_checkpoint(["--load", str(tmp_path / "absent")]) == {}
    with pytest.raises(UsageError, match="give --pretrained-checkpoint CHECKPOINT or --load"):
        model_from_checkpoint([FLAG, "--run-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("layernorm_epsilon", 1e-6), ("rotary_base", 20_000), ("use_rope_scaling", True), ("num_query_groups", 4)],
)
def test_another_model_is_refused_unless_the_command_line_names_it(cases: Path, name: str, value: object) -> None:
    written = Checkpoint.open(cases / "gqa_padded").args
    changed = copy.copy(written)
    check_same_model("--load X", written, changed, [])
    setattr(changed, name, value)
    with pytest.raises(CheckpointError, match=rf"--load X: its model is another one \({name} was .*, is {value}"):
        check_same_model("--load X", written, changed, ["--preset", "tiny"])
    check_same_model("--load X", written, changed, ["--" + name.replace("_", "-") + f"={value}"])


def test_what_means_nothing_does_not_count(cases: Path) -> None:
    written = Checkpoint.open(cases / "mha").args
    changed = copy.copy(written)
    vars(changed).update(num_query_groups=4, rope_scaling_factor=2.0, max_position_embeddings=4096)
    check_same_model("--load X", written, changed, [])


@pytest.mark.parametrize(("tensor_parallel", "rows"), [(1, 32_001), (2, 32_002), (4, 32_004)])
def test_tables_from_hugging_face_keep_their_rows(tensor_parallel: int, rows: int) -> None:
    parsed = argparse.Namespace(tensor_model_parallel_size=tensor_parallel)
    assert vocabulary_rows(parsed, {"vocab_size": 32_001}) == {"padded_vocab_size": rows}
    assert vocabulary_rows(parsed, None) == {}
