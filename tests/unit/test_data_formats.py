"""The pipeline over every format, tokenizer, policy and unit, against Megatron's own builder and tokenizers."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_ledom.data.backends import ReferenceEncoder
from megatron_ledom.data.check import check_dataset
from megatron_ledom.data.documents import read_document
from megatron_ledom.data.manifest import load_manifest
from megatron_ledom.data.preprocess import PreprocessConfig, preprocess
from megatron_ledom.data.sentences import load_splitter, train_splitter
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction, flip
from megatron_ledom.errors import InputError, TokenizerMismatchError, UsageError
from megatron_ledom.testing import code_documents, english_documents, train_bpe_tokenizer, write_jsonl

TEXTS = [*english_documents()[:25], "naïve café 東京 🙂 <s> </s> <unk>", *code_documents(25)]


def tokenizer_of(config: PreprocessConfig) -> Tokenizer:
    files = {"vocab_file": config.vocab_file, "merge_file": config.merge_file}
    return load_tokenizer(config.tokenizer_type, config.tokenizer_model, **files)


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path) -> PreprocessConfig:
    return PreprocessConfig(
        inputs=[write_jsonl(tmp_path / "a.jsonl", TEXTS)],
        output_prefix=str(tmp_path / "out" / "x"),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer_folder),
        append_eod=True,
    )


def run(config: PreprocessConfig, **changes: Any) -> tuple[bytes, bytes]:
    """The bytes of `.bin` and `.idx`."""
    config = dataclasses.replace(config, overwrite=True, **changes)
    preprocess(config)
    assert check_dataset(config.prefixes[0], tokenizer_of(config)).faults == []
    return tuple(Path(f"{config.prefixes[0]}.{s}").read_bytes() for s in ("bin", "idx"))  # type: ignore[return-value]


def sentencepiece_model(folder: Path) -> Path:
    import sentencepiece

    (folder / "text.txt").write_text("\n".join("\n".join(TEXTS).split("\n")[:4000]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        f"--input={folder}/text.txt --model_prefix={folder}/bpe --vocab_size=1500 --model_type=bpe "
        "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false "
        "--character_coverage=0.999 --max_sentence_length=100000 --minloglevel=2 --num_threads=1"
    )
    return folder / "bpe.model"


def tokenizer_flags(kind: str, folder: Path) -> dict[str, str]:
    """Flags of a GPT-2 style BPE (vocab.json, merges.txt), a SentencePiece model, or a tokenizer of bytes alone."""
    if kind == "sentencepiece":
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(sentencepiece_model(folder))}
    made = train_bpe_tokenizer(TEXTS, 2000 if kind == "gpt2" else 257, folder / kind)
    if kind == "bytes":
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(made)}
    model = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (made / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (made / "merges.txt").write_text("\n".join(" ".join(m) for m in model["merges"]), encoding="utf-8")
    files = {"vocab_file": str(made / "vocab.json"), "merge_file": str(made / "merges.txt")}
    return {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, **files}  # type: ignore[dict-item]


def engine_ids(kind: str, flags: dict[str, str], text: str) -> list[int]:
    """Ids by the library that Megatron's tokenizer of that name calls."""
    if kind == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=flags["tokenizer_model"]).encode(text)
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    if kind == "gpt2":
        return GPT2TokenizerFast(vocab=flags["vocab_file"], merges=flags["merge_file"])(text).input_ids
    return PreTrainedTokenizerFast.from_pretrained(flags["tokenizer_model"])(text).input_ids


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "bytes"])
@pytest.mark.parametrize("backend", ["auto", "library"])
def test_bytes_are_those_of_megatrons_builder_with_each_document_reversed(
    config: PreprocessConfig, tmp_path: Path, kind: str, backend: str
) -> None:
    flags = tokenizer_flags(kind, tmp_path)
    config = dataclasses.replace(config, **flags)  # type: ignore[arg-type]
    tokenizer = tokenizer_of(config)
    asked = "auto" if backend == "auto" else tokenizer.library
    found = run(config, tokenizer_backend=asked, shard_mb=0.1)
    used = load_manifest(config.prefixes[0]).tokenizer.backend
    assert used == ("gigatoken" if backend == "auto" else tokenizer.library)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for text in TEXTS:
        ids = torch.tensor([*reversed(engine_ids(kind, flags, text)), tokenizer.eod_id])
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    assert found == ((tmp_path / "m.bin").read_bytes(), (tmp_path / "m.idx").read_bytes())


def test_every_format_gives_the_same_bytes(config: PreprocessConfig, tmp_path: Path) -> None:
    expected = run(config)
    content = config.inputs[0].read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=10)
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:03}.txt").write_bytes(text.encode())
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "texts", "a.jsonl*.gz"):
        assert run(config, inputs=[tmp_path / name], shard_mb=0.01) == expected, name
    manifest = load_manifest(config.prefixes[0])
    assert (manifest.sources[0].format, manifest.sources[0].rows) == ("jsonl", len(TEXTS))


def test_parquet_by_spawned_workers_gives_the_same_bytes(config: PreprocessConfig, tmp_path: Path) -> None:
    expected = run(config)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=10)
    assert run(config, inputs=[tmp_path / "a.parquet"], workers=2, shard_mb=0.01) == expected


def bad_corpus(tmp_path: Path) -> tuple[Path, int]:
    """A corpus with a bad line far behind the first slice; returns its line number."""
    path = write_jsonl(tmp_path / "bad.jsonl", TEXTS)
    number = len(path.read_bytes().split(b"\n"))
    with path.open("ab") as file:
        file.write(b'{"text": 1}\n\n{"text": "fine"}\n\xff\n{"text": ""}\n{"text": "last"}\n')
    return path, number


@pytest.mark.parametrize("shard_mb", [None, 0.02])
def test_a_bad_record_stops_the_run_with_file_and_line_or_is_listed(
    config: PreprocessConfig, tmp_path: Path, shard_mb: float | None
) -> None:
    path, number = bad_corpus(tmp_path)
    config = dataclasses.replace(config, inputs=[path], shard_mb=shard_mb)
    with pytest.raises(InputError, match=f"bad.jsonl:{number}: the value of 'text' must be a string, found a number"):
        preprocess(config)
    run(config, on_bad_record="skip")
    manifest = load_manifest(config.prefixes[0])
    assert (manifest.counts.documents, manifest.counts.bad_records) == (len(TEXTS) + 2, 2)
    assert manifest.sources[0].rows == number + 5
    listed = [json.loads(line) for line in Path(f"{config.prefixes[0]}.skipped.jsonl").read_text().splitlines()]
    assert [(e["source"], e["row"], e["why"][:5]) for e in listed] == [
        *((0, number, "bad: "), (0, number + 1, "blank"), (0, number + 3, "bad: "), (0, number + 4, "empty"))
    ]
    assert listed[2]["why"] == "bad: not UTF-8 (byte 0xff at column 1); convert the file, for instance with iconv"
    last = read_document(config.prefixes[0], manifest, len(TEXTS) + 1)
    assert last.origin == f"{path}, row {number + 5}"


def test_what_a_bad_record_does_may_be_changed_without_doing_the_rest_again(
    config: PreprocessConfig, tmp_path: Path
) -> None:
    path, number = bad_corpus(tmp_path)
    config = dataclasses.replace(config, inputs=[path], shard_mb=0.05)
    with pytest.raises(InputError, match=f"bad.jsonl:{number}: "):
        preprocess(config)
    records = sorted((tmp_path / "out" / "x.shards").glob("0*.json"))
    before = [(p.name, p.stat().st_mtime_ns) for p in records]
    assert len(before) > 5
    skip = dataclasses.replace(config, on_bad_record="skip", num_shards=1, shard_index=0)
    assert preprocess(skip) == []
    assert [(p.name, p.stat().st_mtime_ns) for p in records] == before
    with pytest.raises(InputError, match=r"2 records are bad .* pass --on-bad-record skip"):
        preprocess(config)
    preprocess(dataclasses.replace(config, on_bad_record="skip", max_bad_records=2))
    assert load_manifest(config.prefixes[0]).counts.bad_records == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_more_bad_records_than_allowed_stop_the_run(config: PreprocessConfig, tmp_path: Path, workers: int) -> None:
    path, number = bad_corpus(tmp_path)
    config = dataclasses.replace(config, inputs=[path], on_bad_record="skip", workers=workers)
    with pytest.raises(InputError, match=rf"bad.jsonl:{number}: .* \(and more than --max-bad-records 1 are bad\)"):
        preprocess(dataclasses.replace(config, max_bad_records=1))
    two = write_jsonl(tmp_path / "two.jsonl", TEXTS)
    with two.open("ab") as file:
        file.write(b"{\n")
    both = dataclasses.replace(config, inputs=[path, two], shard_mb=0.05)
    with pytest.raises(InputError, match=r"3 records are bad( so far)?, more than --max-bad-records 2"):
        preprocess(dataclasses.replace(both, max_bad_records=2))
    run(both, max_bad_records=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_bad_records": 3}, "goes with --on-bad-record skip"),
        ({"on_bad_record": "mend"}, "--on-bad-record must be one of fail, skip"),
        ({"reverse_unit": "word"}, "--reverse-unit must be one of token, sentence"),
        ({"reverse_unit": "sentence", "direction": Direction.FORWARD}, "goes with --direction reverse"),
        ({"shard_index": 1}, "go together"),
        ({"shard_index": 2, "num_shards": 2}, "--shard-index must be from 0 to 1, found 2"),
        ({"shard_mb": 0}, "--shard-mb must be more than 0"),
        ({"tokenizer_backend": "sentencepiece"}, "sentencepiece cannot run HuggingFaceTokenizer"),
        ({"tokenizer_backend": "fastest"}, "--tokenizer-backend must be one of auto"),
        ({"text_unit": "word"}, "--text-unit must be one of"),
    ],
)
def test_flags_that_cannot_work_are_refused(config: PreprocessConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        preprocess(dataclasses.replace(config, **changes))


def test_the_reference_works_in_a_thread_that_ends_with_it(config: PreprocessConfig) -> None:
    tokenizer, before = tokenizer_of(config), threading.active_count()
    encoder = ReferenceEncoder(tokenizer)
    assert [ids.tolist() for ids in encoder.encode_batch([b"a text"])] == tokenizer.encode_short(["a text"])
    assert threading.active_count() == before + 1
    assert pickle.loads(pickle.dumps(encoder)).name == tokenizer.library
    del encoder
    deadline = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the thread lives on, and this process cannot be forked"
        time.sleep(0.01)


def test_json_that_is_read_without_the_extension_says_so(
    config: PreprocessConfig, log_of: Callable[[str], pytest.LogCaptureFixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of("megatron_ledom.data.preprocess")
    run(config)
    assert "Python's json" not in log.text
    monkeypatch.setattr("megatron_ledom.data.preprocess.compiled_reader", lambda: None)
    run(dataclasses.replace(config, overwrite=True))
    assert "JSONL is read by Python's json, several times slower: megatron_ledom.data._records is not built" in log.text


def test_a_tokenizer_that_gigatoken_cannot_do_falls_back_and_says_so(
    config: PreprocessConfig, tmp_path: Path, log_of: Callable[[str], pytest.LogCaptureFixture]
) -> None:
    """Without a byte in its vocabulary, or with spaces that only the reference treats so."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(vocab_size=500, special_tokens=["[UNK]", "[E]"]))
    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "[E]"}', encoding="utf-8")
    log = log_of("megatron_ledom.data.backends")
    run(config, tokenizer_model=str(folder))
    assert "gigatoken is not used: " in log.text
    assert load_manifest(config.prefixes[0]).tokenizer.backend == "tokenizers"
    with pytest.raises(TokenizerMismatchError, match=r"--tokenizer-backend gigatoken cannot be used: .* Use auto"):
        run(config, tokenizer_model=str(folder), tokenizer_backend="gigatoken")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_sentences_come_last_to_first_and_the_text_comes_back(
    config: PreprocessConfig, tmp_path: Path, kind: str
) -> None:
    flags = tokenizer_flags(kind, tmp_path)
    config = dataclasses.replace(config, reverse_unit="sentence", **flags)  # type: ignore[arg-type]
    run(config)
    alone = {p.name: p.read_bytes() for p in Path(config.output_prefix).parent.iterdir() if "manifest" not in p.name}
    assert set(alone) == {
        f"x_text_document.{s}" for s in ("bin", "idx", "crc32", "skipped.jsonl", "sentences", "punkt.json")
    }
    run(config, workers=2)
    again = {p.name: p.read_bytes() for p in Path(config.output_prefix).parent.iterdir() if "manifest" not in p.name}
    assert again == alone
    manifest, tokenizer = load_manifest(config.prefixes[0]), tokenizer_of(config)
    assert manifest.reverse_unit == "sentence"
    splitter = load_splitter(Path(f"{config.prefixes[0]}.punkt.json"))
    dataset = IndexedDataset(config.prefixes[0])
    for number, text in enumerate(TEXTS):
        document = read_document(config.prefixes[0], manifest, number)
        whole, starts = tokenizer.encode_with_starts(text)
        assert document.natural.tolist() == whole.tolist() == tokenizer.encode(text).tolist()
        if kind == "bytes":
            assert tokenizer.decode(document.natural) == text
        assert dataset[number].tolist() == document.stored.tolist()
        expected: list[int] = []
        bounds = [*splitter.starts(text).tolist(), len(text) + 1]
        for begin, end in list(pairwise(bounds))[::-1]:
            expected += whole[(starts >= begin) & (starts < end)].tolist()
        assert document.stored.tolist() == [*expected, tokenizer.eod_id]
    given = str(tmp_path / "given.json")
    Path(given).write_bytes(alone["x_text_document.punkt.json"])
    run(config, punkt=given)
    assert Path(f"{config.prefixes[0]}.bin").read_bytes() == alone["x_text_document.bin"]


def test_sentence_bounds_keep_abbreviations_together_and_white_space_with_what_follows() -> None:
    splitter = train_splitter([("Dr. Smith met Dr. Jones. He met Mr. Dr. Brown. " * 40), *english_documents()])
    text = "Dr. Who came.  He left.\n\nEnd"
    starts = splitter.starts(text).tolist()
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == [
        *("Dr. Who came.", "  He left.", "\n\nEnd")
    ]
    assert splitter.starts("").tolist() == [0]
    assert splitter.token_counts(text, np.array([0, 4, 12, 13, 15, 30])).tolist() == [3, 2, 1]
    assert flip(splitter.token_counts(text, np.array([], dtype=np.int32))).tolist() == []


def test_punkt_parameters_that_are_something_else_are_refused(config: PreprocessConfig, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content in ("[]", "{", '{"abbrev_types": 3}', '{"abbrev_types": [], "collocations": [1]}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"p.json holds no Punkt parameters as JSON"):
            run(config, reverse_unit="sentence", punkt=str(path))
    with pytest.raises(InputError, match=r"--punkt .*nowhere.json"):
        run(config, reverse_unit="sentence", punkt=str(tmp_path / "nowhere.json"))


def test_backends_agree_on_a_million_characters(tmp_path: Path, tokenizer_folder: Path) -> None:
    from megatron_ledom.data.backends import FastEncoder, first_difference

    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    texts = code_documents(60)
    assert sum(map(len, texts)) > 1_000_000
    assert first_difference(tokenizer, FastEncoder(tokenizer), texts) is None
    other = train_bpe_tokenizer(TEXTS, 400, tmp_path / "other")
    found = first_difference(tokenizer, FastEncoder(load_tokenizer("HuggingFaceTokenizer", other)), texts)
    assert found is not None and "ids differ for" in found
