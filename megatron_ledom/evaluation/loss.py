"""The loss of forward and reverse models on the same tokens of the same text.

Owns the definition of a document's loss, so that the two directions can stand side by side:

- A document is its tokens and one boundary. The model reads the boundary, predicts every
  token in its own order, and last the boundary beyond the document: both directions
  predict the same n + 1 ids.
- A document longer than the context is read in overlapping windows (`inference/windows.py`), in the model's
  order: windows count from the document's end in a reverse model.

It doesn't own batching (`megatron_ledom.inference`) or the yardstick (`unigram.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ledom.direction import ConditionedIds, Direction, condition
from megatron_ledom.errors import InputError, TokenizerMismatchError, UsageError
from megatron_ledom.evaluation.unigram import UnigramModel
from megatron_ledom.inference import DEFAULT_BATCH_TOKENS
from megatron_ledom.inference.folder import FolderRecord, load_record
from megatron_ledom.inference.windows import cut_windows
from megatron_ledom.log import Progress

if TYPE_CHECKING:  # torch comes with it, and costs seconds that a refusal should not take
    from megatron_ledom.inference.model import DirectedLM

DOCUMENTS_PER_BLOCK = 256


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a set of documents.

    Attributes:
        nll: negative log-likelihood of all of it, in nats.
        num_tokens: ids predicted, boundaries included where they were scored.
        num_bytes: UTF-8 bytes of the text.
    """

    nll: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        """Mean loss per predicted id, in nats."""
        return self.nll / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers."""
        return self.nll / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class LossComparison:
    """The losses of several models on the same tokens.

    Attributes:
        rows: (folder, direction, loss) per model, in the order given.
        unigram: the yardstick on the same tokens, or None where no training data was named.
        num_documents: documents with at least one token.
        context_tokens, stride_tokens: of the windows.
    """

    rows: list[tuple[Path, Direction, TextLoss]]
    unigram: TextLoss | None
    num_documents: int
    context_tokens: int
    stride_tokens: int


def document_loss(
    lm: DirectedLM,
    texts: Sequence[str],
    *,
    context_tokens: int,
    stride_tokens: int,
    closed: bool = True,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
) -> TextLoss:
    """Loss of a model, in its own direction, on whole documents.

    Args:
        lm: a loaded model.
        texts: documents; those without a token are passed over.
        context_tokens: most ids read at once, at most the model's own context.
        stride_tokens: see `cut_windows`; a smaller one gives more context and takes longer.
        closed: also predict the boundary beyond each document.
        batch_tokens: most tokens in a batch.
        progress: updated with the number of documents done.

    Raises:
        InputError: no document has a token.
    """
    nll, num_tokens, num_bytes = 0.0, 0, 0
    for start in range(0, len(texts), DOCUMENTS_PER_BLOCK):
        block = texts[start : start + DOCUMENTS_PER_BLOCK]
        windows: list[ConditionedIds] = []
        for text in block:
            if not (ids_nat := lm.encode(text)):
                continue
            document = condition(ids_nat, [], lm.direction, boundary_id=lm.boundary_id, closed=closed)
            windows.extend(cut_windows(document.ids, context_tokens, stride_tokens))
            num_bytes += len(text.encode("utf-8"))
        scores = lm.score(windows, batch_tokens=batch_tokens)
        nll -= math.fsum(score.logprob for score in scores)
        num_tokens += sum(score.num_tokens for score in scores)
        if progress is not None:
            progress.update(len(block))
    if num_tokens == 0:
        raise InputError("no document has a token: there is nothing to evaluate. Give documents with text")
    return TextLoss(nll, num_tokens, num_bytes)


def compare_losses(
    folders: Sequence[Path],
    texts: Sequence[str],
    *,
    unigram: UnigramModel | None = None,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    device: str = "auto",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    assume_direction: Direction | None = None,
) -> LossComparison:
    """Evaluate several models, and the unigram model, on exactly the same ids.

    Args:
        folders: Hugging Face model folders; each is read in the direction that its config.json says.
        texts: held-out documents.
        unigram: counts of the training data.
        context_tokens: of every model; by default the shortest context among them.
        stride_tokens: by default half the context.
        device: "auto", "cpu" or "cuda".
        batch_tokens: most tokens in a batch.
        assume_direction: of models whose config.json does not say one; forward by default.

    Raises:
        InputError: a folder is not a model, or no document has a token.
        UsageError: a context or stride that cannot work.
        TokenizerMismatchError: the models, or models and training data, have different tokens.
    """
    records = [load_record(folder) for folder in folders]
    context = _choose_context(records, context_tokens)
    stride = max(1, context // 2) if stride_tokens is None else stride_tokens
    if not 1 <= stride <= context:
        raise UsageError(f"--stride is {stride}, it must be between 1 and the context of {context} tokens")
    _check_fingerprints(records, unigram)
    from megatron_ledom.inference.model import load_lm

    closed = unigram is None or unigram.append_eod
    rows: list[tuple[Path, Direction, TextLoss]] = []
    reference: list[list[int]] = []
    for folder, record in zip(folders, records, strict=True):
        lm = load_lm(record.folder, device=device, assume_direction=assume_direction)
        documents = _ids_to_predict(lm, texts, closed=closed)
        reference = reference or documents
        if documents != reference:
            number = next(n for n, (a, b) in enumerate(zip(documents, reference, strict=True), start=1) if a != b)
            raise TokenizerMismatchError(
                f"document {number} has other tokens in {record.folder} than in {records[0].folder}: losses per token "
                "cannot stand side by side. Compare models with one tokenizer, or evaluate them one by one"
            )
        progress = Progress(f"evaluate {lm.direction}", len(texts), "docs")
        loss = document_loss(
            lm,
            texts,
            context_tokens=context,
            stride_tokens=stride,
            closed=closed,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        progress.close()
        rows.append((folder, lm.direction, loss))
    yardstick = None
    if unigram is not None:
        yardstick = TextLoss(unigram.total_nll(reference), rows[0][2].num_tokens, rows[0][2].num_bytes)
    return LossComparison(rows, yardstick, sum(1 for ids in reference if ids), context, stride)


def _ids_to_predict(lm: DirectedLM, texts: Sequence[str], *, closed: bool) -> list[list[int]]:
    """The ids of each document that a model predicts, in natural order, its boundary last; [] without a token."""
    documents = [lm.encode(text) for text in texts]
    return [ids and ids + [lm.boundary_id] * closed for ids in documents]


def _choose_context(records: Sequence[FolderRecord], asked: int | None) -> int:
    known = {r.config["max_position_embeddings"]: r.folder for r in records if r.config.get("max_position_embeddings")}
    if asked is None:
        if not known:
            raise UsageError("no model's config.json says its context (max_position_embeddings). Give --context")
        return min(known)
    if asked < 1 or (known and asked > min(known)):
        limit = f"at most {min(known)}, which {known[min(known)]} reads" if known else "more"
        raise UsageError(f"--context is {asked}, it must be 1 or {limit}")
    return asked


def _check_fingerprints(records: Sequence[FolderRecord], unigram: UnigramModel | None) -> None:
    if unigram is None:
        return
    for record in records:
        found = record.tokenizer_fingerprint
        if found is not None and found != unigram.tokenizer_fingerprint:
            raise TokenizerMismatchError(
                f"{record.folder} was trained with tokenizer {found} (config.json, ledom.tokenizer_fingerprint), "
                f"{unigram.prefix} was made with {unigram.tokenizer_fingerprint}. Name the model's own training data"
            )
