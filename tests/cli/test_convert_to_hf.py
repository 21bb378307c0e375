"""tools/convert_to_hf.py as a user runs it: a TP 2 x PP 2 run becomes a folder that plain transformers uses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ledom.convert.hf import ExportOptions, _converted, export_checkpoint
from megatron_ledom.convert.tokenizer_files import find_tokenizer, write_tokenizer
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.errors import CheckpointError, InputError, OutputError, OutputExistsError, TokenizerMismatchError
from megatron_ledom.testing import english_documents, run_tool, tool_environment, train_bpe_tokenizer


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's last checkpoint, converted by the tool with its defaults but for small shards."""
    output = tmp_path_factory.mktemp("converted") / "hf"
    done = run_tool("convert_to_hf.py", "--load", run / "checkpoints", "--output", output, "--max-shard-size", "300KB")
    assert done.returncode == 0, done.stderr
    assert "reverse model, 279,104 parameters" in done.stdout
    assert "parity: logits within" in done.stdout
    assert [path.name for path in output.parent.iterdir()] == ["hf"]  # nothing temporary is left
    return output


@pytest.mark.distributed
def test_the_folder_holds_what_a_user_expects(exported: Path) -> None:
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    expected = {*shards, "model.safetensors.index.json", "config.json", "generation_config.json", "README.md"}
    assert {path.name for path in exported.iterdir()} == expected | {
        "SHA256SUMS",
        "parity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["vocab_size"] == 1024  # padded to 1,152 at TP 2
    assert config["ledom"]["format_version"] == 1
    assert config["ledom"]["direction"] == "reverse"
    assert config["ledom"]["iteration"] == 4
    assert config["ledom"]["tokenizer_fingerprint"].startswith("sha256:")
    assert "reverse the list of ids" in config["ledom"]["usage"]
    parity = json.loads((exported / "parity.json").read_text())
    assert parity["passed"] and parity["max_relative_difference"] <= 1e-4 and parity["positions"] == 256
    weight_map = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in shards:
        with safe_open(exported / shard, "pt") as file:
            assert set(file.keys()) == {name for name, place in weight_map.items() if place == shard}
            assert (exported / shard).stat().st_size < 310_000


@pytest.mark.distributed
def test_plain_transformers_loads_and_generates(exported: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM" and not any(info.values()), info
    assert model.config.ledom["direction"] == "reverse"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer("The import statement", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, inputs["input_ids"].shape[1] + 5)


@pytest.mark.distributed
def test_the_program_of_the_model_card_runs(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.S)
    assert program and "megatron_ledom" not in program.group(1)
    done = subprocess.run(
        [sys.executable, "-c", program.group(1)],
        cwd=exported,
        capture_output=True,
        text=True,
        check=False,
        env=tool_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n").endswith("and that is why the sky is blue.")
    assert len(done.stdout) > len("and that is why the sky is blue.\n")
    for words in ("reverse** language model", "| steps | 4 |", "tensor 2 x pipeline 2", "arXiv:2507.01335"):
        assert words in card


@pytest.mark.distributed
def test_a_folder_that_exists_is_refused_and_replaced_only_when_asked(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(exported, tmp_path / "hf"))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    refused = run_tool("convert_to_hf.py", "--load", run / "checkpoints", "--output", output)
    assert refused.returncode == 2
    assert re.search(r"^error: --output .*hf exists; .*--overwrite", refused.stderr, re.M)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    options = ("--step", 2, "--overwrite", "--no-parity", "--dtype", "float16")
    done = run_tool("convert_to_hf.py", "--load", run / "checkpoints", "--output", output, *options)
    assert done.returncode == 0, done.stderr
    assert "NOTHING WAS CHECKED" in done.stderr and "NOT CHECKED" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    config = json.loads((output / "config.json").read_text())
    assert (config["ledom"]["iteration"], config["dtype"]) == (2, "float16")
    assert not (output / "parity.json").exists()
    assert "were not compared" in (output / "README.md").read_text()


def test_help_names_every_flag() -> None:
    done = run_tool("convert_to_hf.py", "--help")
    assert done.returncode == 0
    for flag in ("--load", "--output", "--step", "--dtype", "--max-shard-size", "--tokenizer", "--no-parity"):
        assert flag in done.stdout


def test_a_folder_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "save" / "iter_0000010").mkdir(parents=True)
    done = run_tool("convert_to_hf.py", "--load", tmp_path / "save", "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert re.search(r"^error: .*save holds no finished checkpoint: iter_0000010 without latest_", done.stderr, re.M)
    assert not (tmp_path / "hf").exists()


def export(cases: Path, name: str, output: Path, *, tokenizer: Path | None = None, overwrite: bool = False) -> None:
    options = ExportOptions(parity=False, tokenizer=tokenizer, overwrite=overwrite)
    export_checkpoint(cases / name, output, options=options)


def test_an_existing_file_or_a_foreign_folder_is_never_removed(cases: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("file", "folder"):
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match="--overwrite"):
                export(cases, "mha", tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_another_tokenizer_is_refused(cases: Path, tmp_path: Path) -> None:
    other = train_bpe_tokenizer(english_documents()[:9], 600, tmp_path / "other")
    with pytest.raises(TokenizerMismatchError, match=r"was trained with tokenizer sha256:\w+, .*other is sha256"):
        export(cases, "mha", tmp_path / "hf", tokenizer=other)
    with pytest.raises(InputError, match=r"no tokenizer for .*nowhere.*--tokenizer"):
        export(cases, "mha", tmp_path / "hf", tokenizer=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_failure_on_the_way_leaves_nothing(cases: Path, tmp_path: Path) -> None:
    """A damaged chunk is met in the middle of writing."""
    save = Path(shutil.copytree(cases / "mha", tmp_path / "save"))
    data = save / "iter_0000007" / "__0_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(CheckpointError, match="is damaged"):
        export(tmp_path, "save", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), "checkpoint", "the checkpoint itself is not"),
        (float("-inf"), "bfloat16", "the checkpoint itself is not"),
        (1e6, "float16", "choose another --dtype"),
    ],
)
def test_weights_that_are_not_finite_are_named(value: float, dtype: str, words: str) -> None:
    weights = torch.ones(3, 4)
    weights[1, 2] = value
    with pytest.raises(CheckpointError, match=rf"model\.norm is not finite in \w+: {words}"):
        _converted("model.norm", weights, "float32" if dtype == "checkpoint" else dtype)


def test_a_place_that_cannot_be_written_is_refused(cases: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made there"):
        export(cases, "mha", tmp_path / "file" / "hf")


def test_the_forward_twin_needs_no_flip(cases: Path, tmp_path: Path) -> None:
    export(cases, "mha", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["ledom"]["direction"] == "forward"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert ".flip(" not in card and "nothing is to be reversed" in card
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "unigram that normalises", "GPT2BPETokenizer"])
def test_other_kinds_of_tokenizer_give_their_ids_in_transformers(kind: str, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "hf"
    folder.mkdir()
    if kind == "GPT2BPETokenizer":
        train_bpe_tokenizer(english_documents(), 500, source)
        Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(source))
        args = Namespace(tokenizer_type=kind, vocab_file=source / "vocab.json", merge_file=source / "merges.txt")
    else:
        args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=train_sentencepiece(source, kind))
    tokenizer = find_tokenizer(args, tmp_path / "run" / "checkpoints" / "iter_0000001", None)
    special = write_tokenizer(tokenizer, args, folder)
    assert special["bos_token_id"] == (tokenizer.eod_id if kind == "GPT2BPETokenizer" else 1)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eod_id and len(theirs) == tokenizer.vocab_size
    for text in english_documents()[:20]:
        ids, expected = theirs(text, add_special_tokens=False)["input_ids"], tokenizer.encode(text).tolist()
        assert theirs.decode(expected).replace("<unk>", " \u2047 ") == tokenizer.decode(expected)
        if "unigram" in kind:  # of several cuts of a run of asterisks with equal scores, either may be taken
            ids, expected = sorted(ids), sorted(expected)
        assert ids == expected


def train_sentencepiece(folder: Path, kind: str) -> Path:
    """A small SentencePiece model: Llama-like (byte fallback, no normalisation), or with the trainer's defaults."""
    folder.mkdir()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in english_documents() for line in text.splitlines() if line),
        model_prefix=str(folder / "small"),
        model_type=kind.split()[0],
        vocab_size=700,
        split_digits=True,
        minloglevel=2,
        **({} if "normalises" in kind else plain),
    )
    return folder / "small.model"


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A named class makes transformers rebuild the tokenizer and ignore what tokenizer.json says."""
    source = Path(shutil.copytree(tokenizer_folder, tmp_path / "source"))
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=source)
    (tmp_path / "hf").mkdir()
    with pytest.raises(TokenizerMismatchError, match="transformers gives other ids"):
        write_tokenizer(find_tokenizer(args, tmp_path / "run" / "checkpoints" / "iter_1", None), args, tmp_path / "hf")


def test_the_copied_tokenizer_is_the_one_of_training(cases: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    export(cases, "tied", tmp_path / "hf", tokenizer=tokenizer_folder)
    copied = load_tokenizer("HuggingFaceTokenizer", tmp_path / "hf")
    assert copied.fingerprint == load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
