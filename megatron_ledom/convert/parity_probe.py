"""What a parity check reads: a few real sentences, and ids from the whole vocabulary.

    row 0   sentences one after another, each in the model's order, repeated to the full length
    row 1   one id from each of S equal parts of the vocabulary, shuffled, the last id among them

Without a tokenizer that transformers can load there is row 1 alone. Losses are given sentence by sentence, over the
first pass through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ledom.direction import Direction, to_model_order
from megatron_ledom.errors import ParityError

if TYPE_CHECKING:
    import torch

MAX_LENGTH = 128
"""Positions of a row: what a 7B's comparison computes, and so most of its time, is proportional to them."""
SENTENCES = (
    "What came before this sentence?",
    "The reverse model reads a document from its last token to its first.",
    "In 1835 the comet returned, as had been foretold; nobody in the village, not even the teacher, had believed it.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "def previous(step):\n    return step - 1\n",
    "She counted the coins twice, put seventeen of them back into the drawer, and left without closing the door.",
    "If all but three of the 48 pupils passed, then 45 / 48 = 93.75 % of them did.",
    "Die Straße war naß; on lisait « fermé » sur la porte, and we turned back.",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Span:
    """A sentence's place in row 0: ids `start` to `stop`, and its text (cut where the row ends)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class Probe:
    """The ids of a comparison.

    Attributes:
        ids_model: int64 [B, S] in the model's order, B = 2 with sentences and 1 without.
        spans: the sentences of row 0.
        why_no_sentences: None where there are some.
    """

    ids_model: torch.Tensor
    spans: tuple[Span, ...] = ()
    why_no_sentences: str | None = None


def build_probe(hf_folder: Path, *, vocab_size: int, max_length: int, direction: Direction) -> Probe:
    """Build the ids from the folder's tokenizer.

    Args:
        hf_folder: may be without a tokenizer, or with one that transformers cannot load; the report says so.
        vocab_size: of the model: all ids are below it.
        max_length: the most positions that the model takes.
        direction: of the model.

    Raises:
        ParityError: the tokenizer gives ids that the model does not have.
    """
    import torch

    length = min(MAX_LENGTH, max_length)
    random_row = _spread_ids(vocab_size, length)
    if not any((hf_folder / name).is_file() for name in TOKENIZER_FILES):
        return Probe(random_row[None], why_no_sentences="the folder has no tokenizer")
    try:
        tokenized = _tokenized(hf_folder)
    except Exception as error:  # foreign files raise nearly anything
        why = f"transformers cannot load the folder's tokenizer ({type(error).__name__}: {error})"
        return Probe(random_row[None], why_no_sentences=why)
    ids: list[int] = []
    spans: list[Span] = []
    for sentence, ids_nat in tokenized:
        if ids_nat and len(ids) < length:
            spans.append(Span(sentence, len(ids), min(len(ids) + len(ids_nat), length)))
            ids += to_model_order(ids_nat, direction)
    if not ids or max(ids) >= vocab_size:
        found = f"the id {max(ids)}" if ids else "no ids"
        raise ParityError(f"the tokenizer of {hf_folder} gives {found} for plain text; the model has {vocab_size} rows")
    text_row = (ids * (length // len(ids) + 1))[:length]
    return Probe(torch.stack([torch.tensor(text_row), random_row]), tuple(spans))


def _tokenized(hf_folder: Path) -> list[tuple[str, list[int]]]:
    """Each sentence and its ids in natural order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=False)
    return [(sentence, tokenizer(sentence, add_special_tokens=False)["input_ids"]) for sentence in SENTENCES]


def _spread_ids(vocab_size: int, length: int) -> torch.Tensor:
    """`length` ids, int64 [length], one from each equal part of the vocabulary in random order; the last id is one."""
    import torch

    generator = torch.Generator().manual_seed(1234)
    low = torch.arange(length) * vocab_size // length
    high = (torch.arange(length) + 1) * vocab_size // length
    ids = low + (torch.rand(length, generator=generator) * (high - low)).long()
    ids[-1] = vocab_size - 1
    return ids[torch.randperm(length, generator=generator)]
