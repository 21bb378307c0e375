"""Our tokenizers against those that Megatron builds from the same flags, and their fingerprints."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ledom.data.tokenizers import Tokenizer, check_engine_tokenizer, load_tokenizer
from megatron_ledom.errors import InputError, TokenizerMismatchError, UsageError
from megatron_ledom.testing import END_OF_DOCUMENT, code_documents, english_documents

WITHOUT_SPECIAL = "--tokenizer-hf-no-include-special-tokens"


def megatron_tokenizer(*flags: str) -> Any:
    """Build Megatron's tokenizer from its own flags, as its preprocessing tool does."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    return build_tokenizer(args)


def assert_equal_to_megatron(ours: Tokenizer, *flags: str) -> None:
    theirs = megatron_tokenizer("--tokenizer-type", ours.type, *flags)
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)
    documents = [*english_documents()[:10], *code_documents(12), f"a {END_OF_DOCUMENT} inside", " ", ""]
    for document, ids in zip(documents, ours.encode_batch(documents), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs.tokenize(document)
    check_engine_tokenizer(ours, theirs)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    content = io.BytesIO()
    lines = (line for document in english_documents()[:30] for line in document.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=content,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(content.getvalue())
    return path


def edited_copy(folder: Path, target: Path, *, config: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Copy a Hugging Face tokenizer, with fields of its configuration and of tokenizer.json replaced."""
    shutil.copytree(folder, target)
    for name, changes in (("tokenizer.json", fields), ("tokenizer_config.json", config or {})):
        path = target / name
        content = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}), encoding="utf-8")
    return target


def test_hugging_face_ids_are_megatrons(tokenizer_folder: Path) -> None:
    ours = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    assert (ours.type, ours.model, ours.eod_id) == ("HuggingFaceTokenizer", str(tokenizer_folder), 0)
    assert_equal_to_megatron(ours, "--tokenizer-model", str(tokenizer_folder))


def test_no_beginning_of_sequence_is_added_to_documents(tokenizer_folder: Path, tmp_path: Path) -> None:
    # what a Llama tokenizer's post-processor does; Megatron follows it unless told not to
    bos = {"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {END_OF_DOCUMENT: {"id": END_OF_DOCUMENT, "ids": [0], "tokens": [END_OF_DOCUMENT]}},
    }
    folder = edited_copy(tokenizer_folder, tmp_path / "bos", post_processor=template)
    ours = load_tokenizer("HuggingFaceTokenizer", folder)
    assert_equal_to_megatron(ours, "--tokenizer-model", str(folder), WITHOUT_SPECIAL)
    with_bos = megatron_tokenizer("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
    assert with_bos.tokenize("hello") == [0, *ours.encode("hello").tolist()]
    check_engine_tokenizer(ours, with_bos)  # only an id at the end of the document is added: the same tokenizer


@pytest.mark.parametrize("tokenizer_type", ["SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer"])
def test_sentencepiece_ids_are_megatrons(sentencepiece_model: Path, tokenizer_type: str) -> None:
    ours = load_tokenizer(tokenizer_type, sentencepiece_model)
    assert_equal_to_megatron(ours, "--tokenizer-model", str(sentencepiece_model))
    assert ours.decode(ours.encode("the value of x")) == "the value of x"
    in_folder = load_tokenizer(tokenizer_type, sentencepiece_model.parent)
    assert in_folder.fingerprint == ours.fingerprint


def test_gpt2_vocabulary_and_merges_give_megatrons_ids(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab_file, merge_file = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab_file.write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    merge_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    ours = load_tokenizer("GPT2BPETokenizer", vocab_file=vocab_file, merge_file=merge_file)
    # Megatron asks the hub for "gpt2" even though both files are given; a folder of that name answers
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert_equal_to_megatron(ours, "--vocab-file", str(vocab_file), "--merge-file", str(merge_file))
    assert ours.fingerprint == load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint


def test_decoding_gives_the_text_back(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    for text in [*english_documents()[:5], *code_documents(10), "naïve 東京 🙂 \x00 e\u0301\r\n", END_OF_DOCUMENT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_fingerprint_does_not_depend_on_where_and_how_the_files_were_written(
    tokenizer_folder: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    expected = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    assert expected.startswith("sha256:")
    assert len(expected) == len("sha256:") + 64
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "saved_again")
    truncating = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edited_copy(tokenizer_folder, tmp_path / "truncating", truncation=truncating, decoder=None)
    for folder in ("saved_again", "truncating"):
        tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path / folder)
        assert tokenizer.fingerprint == expected
        assert len(tokenizer.encode("word " * 50)) > 50  # no truncation either
    copied = shutil.copy(sentencepiece_model, tmp_path / "other_name.model")
    assert (
        load_tokenizer("Llama2Tokenizer", copied).fingerprint
        == load_tokenizer("SentencePieceTokenizer", sentencepiece_model).fingerprint
    )


def test_the_fingerprint_changes_with_whatever_changes_ids(tokenizer_folder: Path, tmp_path: Path) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    changes: dict[str, dict[str, Any]] = {
        "normalizer": {"normalizer": {"type": "Lowercase"}},
        "pre_tokenizer": {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
        "merges": {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}},
        "added": {"added_tokens": [*content["added_tokens"], content["added_tokens"][0] | {"id": 1, "content": "!"}]},
        "eod": {"config": {"eos_token": "!"}},
        "split": {"config": {"split_special_tokens": True}},
    }
    fingerprints = {load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint}
    for name, change in changes.items():
        folder = edited_copy(tokenizer_folder, tmp_path / name, **change)
        fingerprints.add(load_tokenizer("HuggingFaceTokenizer", folder).fingerprint)
    assert len(fingerprints) == 1 + len(changes)


def test_a_tokenizer_that_transformers_rebuilds_differently_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    # SmolLM2's files are such: digits one by one in tokenizer.json, and a class that ignores it
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    for name, named_class in (("rebuilt", "GPT2Tokenizer"), ("taken", "PreTrainedTokenizerFast")):
        config = {"tokenizer_class": named_class}
        folder = edited_copy(tokenizer_folder, tmp_path / name, config=config, pre_tokenizer=pre_tokenizer)
        ours = load_tokenizer("HuggingFaceTokenizer", folder)
        theirs = megatron_tokenizer("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
        if name == "taken":
            check_engine_tokenizer(ours, theirs)
        else:
            with pytest.raises(TokenizerMismatchError, match='tokenizer_class, set it to "PreTrainedTokenizerFast"'):
                check_engine_tokenizer(ours, theirs)
    plain = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    other_eod = edited_copy(tokenizer_folder, tmp_path / "eod", config={"eos_token": "!"})
    theirs = megatron_tokenizer("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(other_eod))
    with pytest.raises(TokenizerMismatchError, match=r"\(1024, 0\) in preprocessing but \(1024, 1\) in Megatron"):
        check_engine_tokenizer(plain, theirs)


def test_what_is_missing_or_unknown_is_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TikTokenizer is not supported; use one of HuggingFaceTokenizer, "):
        load_tokenizer("TikTokenizer", "x")
    with pytest.raises(UsageError, match="HuggingFaceTokenizer needs --tokenizer-model"):
        load_tokenizer("HuggingFaceTokenizer")
    with pytest.raises(UsageError, match="GPT2BPETokenizer needs --merge-file"):
        load_tokenizer("GPT2BPETokenizer", vocab_file="vocab.json")
    with pytest.raises(InputError, match="--vocab-file v: no such file"):
        load_tokenizer("GPT2BPETokenizer", vocab_file="v", merge_file="m")
    with pytest.raises(InputError, match="openai/gpt2 is not a folder"):
        load_tokenizer("HuggingFaceTokenizer", "openai/gpt2")
    with pytest.raises(InputError, match=r"holds no tokenizer.json"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(InputError, match=r"a folder must hold one .model file, found 0"):
        load_tokenizer("Llama2Tokenizer", tmp_path)
    with pytest.raises(InputError, match=r"nowhere.model: no such file"):
        load_tokenizer("Llama2Tokenizer", tmp_path / "nowhere.model")
    (tmp_path / "text.model").write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match="is no SentencePiece model"):
        load_tokenizer("Llama2Tokenizer", tmp_path / "text.model")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is no tokenizer that"):
        load_tokenizer("HuggingFaceTokenizer", tmp_path)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    for name, message, change in [
        ("no_eos", "names no eos_token", {"config": {"eos_token": "removed"}}),
        ("pad", r"pad_token is '\[PAD\]', which tokenizer.json does not hold", {"config": {"pad_token": "[PAD]"}}),
        ("dropout", "BPE dropout 0.1", {"model": content["model"] | {"dropout": 0.1}}),
    ]:
        folder = edited_copy(tokenizer_folder, tmp_path / name, **change)
        with pytest.raises(InputError, match=message):
            load_tokenizer("HuggingFaceTokenizer", folder)


def test_older_special_tokens_map_and_tokens_written_as_objects_are_read(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = edited_copy(tokenizer_folder, tmp_path / "old", config={"eos_token": "removed"})
    token = {"content": END_OF_DOCUMENT, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}), encoding="utf-8")
    ours = load_tokenizer("HuggingFaceTokenizer", folder)
    assert ours.fingerprint == load_tokenizer("HuggingFaceTokenizer", tokenizer_folder).fingerprint
    theirs = megatron_tokenizer("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
    check_engine_tokenizer(ours, theirs)


def test_preprocessing_imports_neither_torch_nor_transformers_nor_megatron(tokenizer_folder: Path) -> None:
    code = (
        "import sys, megatron_ledom.data.preprocess, megatron_ledom.data.dataset as d\n"
        "from megatron_ledom.data.tokenizers import load_tokenizer\n"
        f"load_tokenizer('HuggingFaceTokenizer', {str(tokenizer_folder)!r}).encode('a')\n"
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
