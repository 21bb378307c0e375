"""A checkpoint used as it is: the model that its exported folder gives, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.errors import CheckpointError, DirectionError, InputError
from megatron_ledom.inference import ForwardLM, ReverseLM, load_lm

PAIR = ("The expression", " is evaluated")


@pytest.mark.parametrize("name", ["gqa_padded", "tied", "rope_llama3", "bfloat16", "mha"])
def test_it_scores_and_writes_as_its_export_does(cases: Path, tmp_path: Path, name: str) -> None:
    export_checkpoint(cases / name, tmp_path / "hf", options=ExportOptions(parity=False))
    mine, exported = (load_lm(folder, device="cpu") for folder in (cases / name, tmp_path / "hf"))
    assert type(mine) is type(exported) is (ForwardLM if name == "mha" else ReverseLM)
    assert mine.logprobs([PAIR, PAIR[::-1]]) == exported.logprobs([PAIR, PAIR[::-1]])
    assert (mine.boundary_id, mine.context_tokens) == (exported.boundary_id, exported.context_tokens)
    if isinstance(mine, ReverseLM):
        assert isinstance(exported, ReverseLM)
        assert mine.write_before(PAIR[1], max_new_tokens=8) == exported.write_before(PAIR[1], max_new_tokens=8)


def test_another_dtype_is_read_as_asked_for(cases: Path) -> None:
    exact = ReverseLM.load(cases / "tied", device="cpu", dtype=torch.float64)
    assert exact.model.dtype is torch.float64
    rough = ReverseLM.load(cases / "tied", device="cpu").logprob(*PAIR)
    assert exact.logprob(*PAIR).logprob == pytest.approx(rough.logprob, rel=1e-5)


def test_a_checkpoint_of_the_other_direction_or_none_at_all_is_refused(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match=r"is a forward model \(its saved arguments\)"):
        ReverseLM.load(cases / "mha", device="cpu")
    with pytest.raises(InputError, match=r"no config.json: it is not a Hugging Face model, and no Megatron checkpoint"):
        ReverseLM.load(tmp_path, device="cpu")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="names step 7"):
        ReverseLM.load(tmp_path, device="cpu")
