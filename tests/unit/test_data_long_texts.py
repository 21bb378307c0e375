"""A long text that is cut before it is tokenised has the ids of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_ledom.data.backends import probe_texts
from megatron_ledom.data.long_texts import _EXPRESSIONS, PIECE_CHARS, Cutter
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.testing import code_documents, english_documents

SCRIPTS = (
    "Съешь ещё\nбулок.\nВыпей же чаю\n\n  и отступ\nконец\n" * 20,  # noqa: RUF001
    "日本語の文章です。\n次の行もあります。\n終わり\n" * 20,
    "한국어 문장입니다.\n다음 줄\n" * 20,
    "tail  \nspaces \n\n x\n\ty\r\nz\n1\n2 3 a b's it's ok'll'm\n" * 20,
    "<|im_start|>user\nwhat <|im_end|> is\n<|im_end|>this\n" * 20,
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*english_documents()[:40], *code_documents(12), *probe_texts(), "\n".join(probe_texts()), *SCRIPTS]


def tokenizers(texts: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield byte-level BPE tokenizers that split words in every way that is cut, and their names."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    after_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ways = {"GPT-2": plain, "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])}
    for number, expression in enumerate(_EXPRESSIONS):
        split = pre_tokenizers.Split(Regex(expression), "isolated")
        ways[f"expression {number}"] = pre_tokenizers.Sequence([split, after_split])
    for name, way in ways.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = way
        if name == "expression 2":  # as Qwen's
            backend.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([AddedToken("<|im_end|>"), AddedToken("is th", lstrip=True, rstrip=True)])
        yield name, backend


def test_pieces_have_the_ids_of_the_whole(texts: list[str]) -> None:
    num_pieces = 0
    for name, backend in tokenizers(texts):
        cutter = Cutter(json.loads(backend.to_str()))
        assert cutter.can_cut, name
        for text in texts:
            whole = backend.encode(text, add_special_tokens=False).ids
            for piece_chars in (1, 40, 700):
                pieces = list(cutter.cut(text, piece_chars))
                assert "".join(pieces) == text
                assert all(len(piece) >= piece_chars for piece in pieces[:-1])
                found = [i for piece in pieces for i in backend.encode(piece, add_special_tokens=False).ids]
                assert found == whole, (name, piece_chars, text[:80])
                num_pieces += len(pieces)
    assert num_pieces > 50_000


def test_a_wrong_place_would_be_seen(texts: list[str]) -> None:
    (_, backend), *_ = tokenizers(texts)
    text = texts[0]
    halves = [backend.encode(half, add_special_tokens=False).ids for half in (text[:1001], text[1001:])]
    assert halves[0] + halves[1] != backend.encode(text, add_special_tokens=False).ids


def test_what_might_look_beyond_a_word_is_not_cut(texts: list[str]) -> None:
    (_, backend), *_ = tokenizers(texts)
    content = json.loads(backend.to_str())
    level = content["pre_tokenizer"]
    split = {"type": "Split", "pattern": {"Regex": r'"[^"]*"|\S+|\s+'}, "behavior": "Isolated", "invert": False}
    for changed in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}},
        {"pre_tokenizer": level | {"add_prefix_space": True}},
        {"pre_tokenizer": level | {"use_regex": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}},
        {"model": content["model"] | {"type": "Unigram"}},
    ):
        cutter = Cutter(content | changed)
        assert not cutter.can_cut
        assert list(cutter.cut("a b c\nd", 1)) == ["a b c\nd"]


def test_a_book_is_tokenised_in_pieces(tokenizer_folder: Any) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    book = "\n".join(english_documents())
    book = (book * (1 + 3 * PIECE_CHARS // len(book)))[: 3 * PIECE_CHARS]
    ids, other = tokenizer.encode_batch([book, "short"])
    whole = tokenizer._backend.encode(book, add_special_tokens=False)
    assert ids.tolist() == whole.ids and other.tolist() == tokenizer.encode("short").tolist()
    with_starts, starts = tokenizer.encode_with_starts(book)
    assert np.array_equal(with_starts, ids)
    assert starts.tolist() == [start for start, _ in whole.offsets]
