"""The preprocessing pipeline: read, tokenise, reverse, write.

    files --chunks of whole lines--> workers: parse, tokenise, reverse --arrays of ids--> one writer

Workers are separate processes that share nothing. Results are taken in the order of the
chunks, so the bytes of the output do not depend on the number of workers; a window of
two chunks a worker keeps memory flat. It owns the order of things and the worker
processes; reading, tokenising, reversing, writing have their own modules.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ledom import __version__
from megatron_ledom.data.indexed import DatasetWriter, optimal_dtype
from megatron_ledom.data.manifest import (
    Counts,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    stage_manifest,
)
from megatron_ledom.data.sources import Chunk, check_inputs, parse_chunk, read_chunks
from megatron_ledom.data.tokenizers import Tokenizer, load_tokenizer
from megatron_ledom.direction import Direction, stored_document
from megatron_ledom.errors import InputError, OutputExistsError, UsageError
from megatron_ledom.log import Progress, get_logger


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to make of which files.

    Attributes:
        inputs: JSONL files, `.gz` or not, in the order in which their documents shall stand.
        output_prefix: the datasets are called `PREFIX_{key}_document`.
        tokenizer_type: see `load_tokenizer`; so are the next three.
        json_keys: the fields to make a dataset of, one each.
        direction: the order of the ids in the files.
        append_eod: close every document with the end-of-document id.
        workers: processes that tokenise; 1 works in this process.
        overwrite: replace datasets of the same name.
    """

    inputs: Sequence[Path]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    json_keys: Sequence[str] = ("text",)
    direction: Direction = Direction.REVERSE
    append_eod: bool = False
    workers: int = 1
    overwrite: bool = False

    @property
    def prefixes(self) -> list[str]:
        """The datasets to be written, in the order of `json_keys`; Megatron's names."""
        return [f"{self.output_prefix}_{key}_document" for key in self.json_keys]

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the fields name."""
        return load_tokenizer(
            self.tokenizer_type, self.tokenizer_model, vocab_file=self.vocab_file, merge_file=self.merge_file
        )


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of one key in one chunk, as they shall stand in the `.bin` file.

    `ids` [tokens] holds documents one after the other, `lengths` int32 [documents] their sizes.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    empty_documents: int
    eod_in_text: int


class ChunkEncoder:
    """Turns a chunk of JSONL into stored documents; one in every worker process."""

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._keys = tuple(config.json_keys)
        self._direction = config.direction
        self._append_eod_id = tokenizer.eod_id if config.append_eod else None
        self._dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> list[EncodedTexts]:
        """Parse, tokenise and put into stored order; one result a key.

        Raises:
            InputError: a line is bad (see `parse_chunk`), or an id does not fit the file's dtype.
        """
        documents = list(parse_chunk(chunk, self._keys))
        return [self._encode_texts([d.texts[i] for d in documents], chunk) for i in range(len(self._keys))]

    def _encode_texts(self, texts: list[str], chunk: Chunk) -> EncodedTexts:
        natural = self._tokenizer.encode_batch(texts)
        kept = [ids for ids in natural if len(ids)]
        stored = [stored_document(ids, self._direction, self._append_eod_id) for ids in kept]
        flat = np.concatenate(stored) if stored else np.empty(0, dtype=np.int32)
        if len(flat) and flat.max() > np.iinfo(self._dtype).max:
            raise InputError(
                f"{chunk.path}, lines from {chunk.first_line}: the tokenizer gave id {flat.max()}, which does not fit "
                f"{self._dtype.name}, the type for its vocabulary of {self._tokenizer.vocab_size}"
            )
        num_eod = int(np.count_nonzero(flat == self._tokenizer.eod_id))
        return EncodedTexts(
            ids=flat.astype(self._dtype),
            lengths=np.array([len(ids) for ids in stored], dtype=np.int32),
            text_bytes=sum(len(t) if t.isascii() else len(t.encode("utf-8")) for t in texts),
            empty_documents=len(natural) - len(kept),
            eod_in_text=num_eod - (len(stored) if self._append_eod_id is not None else 0),
        )


@dataclass
class _Totals:
    """Running counts of one dataset; `documents` has one entry an input file."""

    documents: list[int]
    text_bytes: int = 0
    empty_documents: int = 0
    eod_in_text: int = 0

    def add(self, source: int, encoded: EncodedTexts) -> None:
        self.documents[source] += len(encoded.lengths)
        self.text_bytes += encoded.text_bytes
        self.empty_documents += encoded.empty_documents
        self.eod_in_text += encoded.eod_in_text


def preprocess(config: PreprocessConfig) -> list[Manifest]:
    """Write one dataset a key and return their manifests, in the order of `json_keys`.

    Nothing lies under a final name before everything is written; on failure the temporary
    files are removed.

    Raises:
        UsageError: flags that cannot work.
        OutputError: the output cannot be written (disk full).
        InputError: an input file or line is bad, nothing is left to write, or a worker died.
        OutputExistsError: a dataset of that name is there and `overwrite` is not set.
    """
    _check_config(config)
    total_bytes = check_inputs(config.inputs)
    tokenizer = config.load_tokenizer()
    dtype = optimal_dtype(tokenizer.vocab_size)
    totals = [_Totals([0] * len(config.inputs)) for _ in config.json_keys]
    with ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(prefix, dtype)) for prefix in config.prefixes]
        progress = Progress("tokenise", total_bytes / 1e6, "MB")
        for chunk, encoded in _encode_in_order(config, tokenizer):
            for writer, total, texts in zip(writers, totals, encoded, strict=True):
                writer.add(texts.ids, texts.lengths)
                total.add(chunk.source, texts)
            progress.update(chunk.input_bytes / 1e6)
        _check_not_empty(config, writers)
        manifests = [
            _describe(config, tokenizer, key, writer, total)
            for key, writer, total in zip(config.json_keys, writers, totals, strict=True)
        ]
        staged = [
            stack.enter_context(stage_manifest(manifest, prefix))
            for prefix, manifest in zip(config.prefixes, manifests, strict=True)
        ]
        progress.close()
        for writer, manifest_file in zip(writers, staged, strict=True):
            manifest_file.path.unlink(missing_ok=True)  # new data never stands beside an old manifest
            writer.publish()
            manifest_file.publish()
    _warn_of_eod_in_text(config, manifests)
    return manifests


def _check_config(config: PreprocessConfig) -> None:
    if config.workers < 1:
        raise UsageError(f"--workers must be at least 1, found {config.workers}")
    if not config.json_keys or len(set(config.json_keys)) != len(config.json_keys):
        raise UsageError(f"--json-keys must name different keys, found {' '.join(config.json_keys) or 'none'}")
    if config.output_prefix.endswith("/"):
        raise UsageError(f"--output-prefix {config.output_prefix} is a folder; add the beginning of a file name")
    suffixes = (".bin", ".idx", ".manifest.json")
    existing = [f for prefix in config.prefixes for s in suffixes if Path(f := f"{prefix}{s}").exists()]
    if existing and not config.overwrite:
        raise OutputExistsError(f"{existing[0]} exists; choose another --output-prefix or pass --overwrite")


def _check_not_empty(config: PreprocessConfig, writers: Sequence[DatasetWriter]) -> None:
    for key, writer in zip(config.json_keys, writers, strict=True):
        if writer.num_documents == 0:
            raise InputError(
                f"the corpus is empty: no text under the key {key!r} in {', '.join(map(str, config.inputs))}"
            )


def _describe(
    config: PreprocessConfig, tokenizer: Tokenizer, key: str, writer: DatasetWriter, totals: _Totals
) -> Manifest:
    """Finish the files of `writer` under their temporary names and return what they are."""
    files = writer.finish()
    model = config.tokenizer_model if config.tokenizer_model is not None else config.vocab_file
    return Manifest(
        direction=config.direction,
        append_eod=config.append_eod,
        tokenizer=TokenizerRecord(
            type=tokenizer.type,
            model=str(Path(str(model)).resolve()),
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        ),
        counts=Counts(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=totals.text_bytes,
            empty_documents=totals.empty_documents,
            eod_in_text=totals.eod_in_text,
        ),
        dtype=writer.dtype.name,
        files=files,
        sources=[
            SourceRecord(str(path.resolve()), path.stat().st_size, documents)
            for path, documents in zip(config.inputs, totals.documents, strict=True)
        ],
        json_key=key,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        megatron_ledom_version=__version__,
    )


def _warn_of_eod_in_text(config: PreprocessConfig, manifests: Sequence[Manifest]) -> None:
    for prefix, manifest in zip(config.prefixes, manifests, strict=True):
        if manifest.counts.eod_in_text:
            get_logger(__name__).warning(
                "warning: %s: the text itself holds the end-of-document token %d times (counts.eod_in_text in the "
                "manifest); the model will see document boundaries there, as with Megatron's own tool",
                prefix,
                manifest.counts.eod_in_text,
            )


def _encode_in_order(config: PreprocessConfig, tokenizer: Tokenizer) -> Iterator[tuple[Chunk, list[EncodedTexts]]]:
    """Yield every chunk (without its data) with its encoding, in the order of the files."""
    chunks = read_chunks(config.inputs)
    if config.workers == 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one core
        encoder = ChunkEncoder(config, tokenizer)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    # spawn: a fork of a process with threads (torch, a notebook) can hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start_worker, initargs=(config,))
    window: deque[tuple[Chunk, Future[list[EncodedTexts]]]] = deque()
    try:
        for chunk in chunks:
            window.append((chunk, _submit(pool, chunk)))
            if len(window) >= 2 * config.workers:
                yield _take(window)
        while window:
            yield _take(window)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: Chunk) -> Future[list[EncodedTexts]]:
    try:
        return pool.submit(_encode_chunk, chunk)
    except BrokenProcessPool as error:
        raise _worker_died(chunk) from error


def _take(window: deque[tuple[Chunk, Future[list[EncodedTexts]]]]) -> tuple[Chunk, list[EncodedTexts]]:
    chunk, future = window.popleft()
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        raise _worker_died(chunk) from error


def _worker_died(chunk: Chunk) -> InputError:
    return InputError(
        f"a worker process died while the documents of {chunk.path} from line {chunk.first_line} on were waited for "
        "(killed, or out of memory?); nothing was written. Try fewer --workers"
    )


# One per worker process: set when it starts, since a tokenizer is too big to travel with every chunk.
_encoder: ChunkEncoder | None = None


def _start_worker(config: PreprocessConfig) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = ChunkEncoder(config, config.load_tokenizer())


def _exit_with_parent() -> None:
    """Leave when the parent is gone: an executor's worker would wait for work for ever after its SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(chunk: Chunk) -> list[EncodedTexts]:
    assert _encoder is not None
    return _encoder.encode(chunk)
