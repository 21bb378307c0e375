"""The preprocessing pipeline: what to make of which files, cut into shards, made by workers, joined.

    inputs -> sources -> shards --> workers: read, tokenise, reverse, write --> PREFIX.shards/ --> joined, published

The cut depends on the files and options alone, and so do the bytes of the result: not on
workers, nodes, the size of shards, or how often the job was killed. The same command goes on where a killed
one stopped. This module owns the order of things; `encode.py` makes a shard, `merge.py` joins them.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.data.backends import BACKENDS, choose_backend
from megatron_ledom.data.encode import EncodeTask, SampleChecks
from megatron_ledom.data.fingerprints import files_sha256
from megatron_ledom.data.indexed import optimal_dtype
from megatron_ledom.data.manifest import PARTS, REVERSE_UNITS, Manifest, PairRecord
from megatron_ledom.data.merge import merge_shards
from megatron_ledom.data.pairs import SIDECAR
from megatron_ledom.data.publishing import (
    check_not_there,
    dataset_prefixes,
    finish_publishing,
    joined_meanwhile,
    standing_manifests,
)
from megatron_ledom.data.records import compiled_reader
from megatron_ledom.data.sentences import SAMPLE_BYTES, SentenceSplitter, load_splitter, train_splitter
from megatron_ledom.data.shards import WorkFolder
from megatron_ledom.data.sources import TEXT_UNITS, Slice, Source, cut_sources, find_sources, read_slice
from megatron_ledom.data.tokenizer_process import load_aside
from megatron_ledom.data.tokenizers import Tokenizer
from megatron_ledom.data.workers import run_parallel
from megatron_ledom.direction import Direction
from megatron_ledom.errors import InputError, LedomError, UsageError
from megatron_ledom.log import Progress, get_logger

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 4 << 20, 256 << 20
_SHARD_ROOT_BYTES = 128 << 10  # shards grow with the root of the corpus, and so does their number
_PROBES, _PROBE_CHARS = 8, 8192  # places of the corpus that are compared before a library is trusted, and how much


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to make of which files.

    Attributes:
        inputs: files, folders or globs, in the order in which their documents shall stand; see `sources.py`.
        output_prefix: the datasets are called `PREFIX_{key}_document`.
        tokenizer_type: see `load_tokenizer`; so are the next three.
        json_keys: the fields (of parquet: columns) to make a dataset of, one each.
        direction: the order of the ids in the files.
        reverse_unit: what is reversed: the "token"s of a document, or its "sentence"s, tokens inside in order.
        punkt: with sentences: "train" learns where they end from the corpus; else a file of Punkt parameters.
        text_unit: what a document of a text file is: "file", "line" or "paragraph".
        pairs: the two `json_keys` are question and answer, and become one dataset, `PREFIX_pairs_document`, of which
            this is the record; see `pairs.py`.
        max_tokens: of pairs: a longer one, one boundary counted, is a bad record.
        append_eod: close every document with the end-of-document id.
        on_bad_record: "fail" at the first one, or "skip" and list them.
        max_bad_records: with "skip": fail when there are more; None for any number.
        tokenizer_backend: one of `BACKENDS`.
        workers: processes; 1 works in this process.
        shard_mb: megabytes of input in a shard; None for what suits the corpus.
        shard_index: with `num_shards`: do this share of the shards, counted from 0, and do not join them.
        num_shards: into how many shares the work is divided.
        overwrite: replace datasets of the same name, and unfinished work of another command.
    """

    inputs: Sequence[Path]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    json_keys: Sequence[str] = ("text",)
    direction: Direction = Direction.REVERSE
    reverse_unit: str = "token"
    punkt: str = "train"
    text_unit: str = "file"
    pairs: PairRecord | None = None
    max_tokens: int | None = None
    append_eod: bool = False
    on_bad_record: str = "fail"
    max_bad_records: int | None = None
    tokenizer_backend: str = "auto"
    workers: int = 1
    shard_mb: float | None = None
    shard_index: int | None = None
    num_shards: int | None = None
    overwrite: bool = False

    @property
    def prefixes(self) -> list[str]:
        """The datasets to be written, in the order of `outputs`; Megatron's names."""
        return dataset_prefixes(self.output_prefix, self.outputs)

    @property
    def outputs(self) -> list[str]:
        """What distinguishes the names of the datasets."""
        return list(self.json_keys) if self.pairs is None else [SIDECAR]


def preprocess(config: PreprocessConfig, tokenizer: Tokenizer | None = None) -> list[Manifest]:
    """Write one dataset a key and return their manifests, in the order of `json_keys`.

    Args:
        config: what to make of which files.
        tokenizer: the one that `config` names, where it is loaded already or by `load_aside`.

    Nothing lies under a final name before everything is written. Where the run fails or is
    killed, finished shards stay in `PREFIX.shards/`, and the same command goes on from there.

    Returns:
        Nothing where only a share was asked for (`shard_index`).

    Raises:
        UsageError: flags that cannot work.
        OutputError: the output cannot be written (disk full).
        InputError: an input file or record is bad, nothing is left to write, or a worker died.
        OutputExistsError: a dataset of that name, or unfinished work of another command, is there.
    """
    check_config(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one core
    work = WorkFolder(config.output_prefix)
    work.sweep()
    before = standing_manifests(config.prefixes)
    if not config.overwrite and not work.is_publishing:
        check_not_there(config.prefixes)
    with contextlib.ExitStack() as stack:
        if tokenizer is None:
            named = (config.tokenizer_type, config.tokenizer_model, config.vocab_file, config.merge_file)
            tokenizer = stack.enter_context(load_aside(*named))
        task = _task(config, work, tokenizer)
        try:
            manifests = _make_and_join(config, task)
        except BaseException as error:
            done = _joined(work, config.prefixes, before, tokenizer) if isinstance(error, Exception) else None
            if done is None:
                _keep_or_remove(work, is_share=config.shard_index is not None)
                raise
            manifests = done if config.shard_index is None else []
    if manifests:  # none of a share
        _warn_of_eod_in_text(config, manifests)
    return manifests


def _joined(
    work: WorkFolder, prefixes: Sequence[str], before: Sequence[bytes | None], tokenizer: Tokenizer
) -> list[Manifest] | None:
    """Return the manifests where another process has joined this run's plan and removed its folder; None elsewhere."""
    if work.path.exists():
        return None
    try:
        return joined_meanwhile(work, prefixes, before, tokenizer.fingerprint)
    except LedomError:  # the process that holds the tokenizer is gone, too
        return None


def _make_and_join(config: PreprocessConfig, task: EncodeTask) -> list[Manifest]:
    """Make the shards, and join them where this run does not make a share alone."""
    done = finish_publishing(task.folder, config.prefixes)  # by a run of the same plan, or it had been refused
    if done is not None:
        return done
    made = _make_shards(config, task)
    task.folder.note_fingerprint(task.tokenizer.fingerprint)
    if config.shard_index is not None:
        task.folder.check_plan()
        return []
    return merge_shards(
        config.output_prefix,
        workers=config.workers,
        overwrite=config.overwrite,
        trusted=made,
        work=task.folder,
    )


def _task(config: PreprocessConfig, work: WorkFolder, tokenizer: Tokenizer) -> EncodeTask:
    """Decide what is made of what, and open the folder for it."""
    sources = find_sources(config.inputs)
    if compiled_reader() is None and any(source.format == "jsonl" for source in sources):
        get_logger(__name__).warning(
            "JSONL is read by Python's json, several times slower: megatron_ledom.data._records is not built; to build "
            "it: python setup.py build_ext --inplace, or pip install again where there is a C++ compiler"
        )
    shard_bytes = _shard_bytes(config, sources)
    shards = cut_sources(sources, shard_bytes, config.text_unit)
    if not shards:
        raise InputError(f"the corpus is empty: {', '.join(map(str, config.inputs))} hold parquet files without a row")
    splitter = _splitter(config, work, sources, shards)
    if splitter is not None:  # every worker asks the tokenizer itself where tokens start
        tokenizer = tokenizer.here()
    encoder = choose_backend(tokenizer, config.tokenizer_backend, _sample(config, sources, shards))
    plan = _plan(config, sources, shards, shard_bytes, tokenizer, splitter)
    work.open(plan, start_over=config.overwrite, is_share=config.shard_index is not None)
    return EncodeTask(
        sources=sources,
        shards=shards,
        json_keys=config.json_keys,
        text_unit=config.text_unit,
        direction=config.direction,
        splitter=splitter,
        append_eod=config.append_eod,
        dtype=optimal_dtype(tokenizer.vocab_size),
        max_bad_records=_bad_limit(config),
        pairs=config.pairs,
        max_tokens=config.max_tokens,
        folder=work,
        tokenizer=tokenizer,
        encoder=encoder,
        num_bytes=sum(source.num_bytes for source in sources),
    )


def check_config(config: PreprocessConfig) -> None:
    """Raise UsageError for fields that cannot work, alone or together."""
    if config.workers < 1:
        raise UsageError(f"--workers must be at least 1, found {config.workers}")
    if not config.json_keys or len(set(config.json_keys)) != len(config.json_keys):
        raise UsageError(f"--json-keys must name different keys, found {' '.join(config.json_keys) or 'none'}")
    if config.output_prefix.endswith("/"):
        raise UsageError(f"--output-prefix {config.output_prefix} is a folder; add the beginning of a file name")
    for flag, value, known in (
        ("--reverse-unit", config.reverse_unit, REVERSE_UNITS),
        ("--text-unit", config.text_unit, TEXT_UNITS),
        ("--on-bad-record", config.on_bad_record, ("fail", "skip")),
        ("--tokenizer-backend", config.tokenizer_backend, BACKENDS),
    ):
        if value not in known:
            raise UsageError(f"{flag} must be one of {', '.join(known)}, found {value}")
    if config.reverse_unit == "sentence" and config.direction is not Direction.REVERSE:
        raise UsageError("--reverse-unit sentence goes with --direction reverse: a forward file reverses nothing")
    if config.pairs is not None and config.pairs.loss_on not in PARTS:
        raise UsageError(f"--loss-on must be one of {', '.join(PARTS)}, found {config.pairs.loss_on}")
    if config.max_tokens is not None and config.max_tokens < 3:
        raise UsageError(f"--max-tokens must be at least 3 (boundary, question, answer), found {config.max_tokens}")
    if config.max_bad_records is not None and (config.max_bad_records < 0 or config.on_bad_record == "fail"):
        raise UsageError("--max-bad-records takes a number from 0 on, and goes with --on-bad-record skip")
    if (config.shard_index is None) != (config.num_shards is None):
        raise UsageError("--shard-index and --num-shards go together")
    if config.shard_index is not None and not 0 <= config.shard_index < (config.num_shards or 0):
        raise UsageError(f"--shard-index must be from 0 to {(config.num_shards or 0) - 1}, found {config.shard_index}")
    if config.shard_mb is not None and not config.shard_mb > 0:
        raise UsageError(f"--shard-mb must be more than 0, found {config.shard_mb}")


def _shard_bytes(config: PreprocessConfig, sources: Sequence[Source]) -> int:
    if config.shard_mb is not None:
        return max(1, int(config.shard_mb * (1 << 20)))
    total = sum(source.num_bytes for source in sources)
    return min(max(math.isqrt(total * _SHARD_ROOT_BYTES), MIN_SHARD_BYTES), MAX_SHARD_BYTES)


def _bad_limit(config: PreprocessConfig) -> int | None:
    """The most bad records that are passed over; None stops at the first."""
    if config.on_bad_record == "fail":
        return None
    return (1 << 62) if config.max_bad_records is None else config.max_bad_records


def _plan(
    config: PreprocessConfig,
    sources: Sequence[Source],
    shards: Sequence[Sequence[Slice]],
    shard_bytes: int,
    tokenizer: Tokenizer,
    splitter: SentenceSplitter | None,
) -> dict[str, Any]:
    """All that decides the bytes of the result, and what the manifest says besides; two runs of one plan may mix."""
    model = config.tokenizer_model if config.tokenizer_model is not None else config.vocab_file
    return {
        "inputs": list(map(str, config.inputs)),
        "sources": [
            {"path": str(s.path.resolve()), "bytes": s.num_bytes, "mtime_ns": s.mtime_ns, "format": s.format}
            for s in sources
        ],
        "text_unit": config.text_unit,
        "json_keys": config.outputs,
        "tokenizer": {
            "type": tokenizer.type,
            "model": str(Path(str(model)).resolve()),
            "files_sha256": files_sha256(tokenizer.files),  # the fingerprint follows when it is made
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "dtype": optimal_dtype(tokenizer.vocab_size).name,
        "direction": str(config.direction),
        "reverse_unit": config.reverse_unit,
        "punkt": None if splitter is None else splitter.parameters,
        "append_eod": config.append_eod,
        "pairs": None if config.pairs is None else asdict(config.pairs),
        "max_tokens": config.max_tokens,
        "max_bad_records": _bad_limit(config),
        "shard_bytes": shard_bytes,
        "shards": [[list(part) for part in shard] for shard in shards],
    }


def _splitter(
    config: PreprocessConfig, work: WorkFolder, sources: Sequence[Source], shards: Sequence[Sequence[Slice]]
) -> SentenceSplitter | None:
    if config.reverse_unit != "sentence":
        return None
    if config.punkt != "train":
        return load_splitter(Path(config.punkt))
    get_logger(__name__).info("learning where sentences end from %d MB of the corpus", SAMPLE_BYTES >> 20)
    places = max(1, min(len(shards), 16))
    chosen = [shards[len(shards) * i // places] for i in range(places)]
    return train_splitter(text for shard in chosen for text in _head(config, sources, shard, SAMPLE_BYTES // places))


def _sample(config: PreprocessConfig, sources: Sequence[Source], shards: Sequence[Sequence[Slice]]) -> Iterator[str]:
    """Yield documents from places all over the corpus."""
    places = min(len(shards), _PROBES)
    for place in range(places):
        yield from _head(config, sources, shards[len(shards) * place // places], _PROBE_CHARS)


def _head(config: PreprocessConfig, sources: Sequence[Source], shard: Sequence[Slice], chars: int) -> Iterator[str]:
    """Yield the first texts of a shard, about `chars` of them; what cannot be read is told by the worker later."""
    with contextlib.suppress(InputError):
        for part in shard:
            for batch in read_slice(sources[part.source], part, config.json_keys, config.text_unit):
                for texts in zip(*batch.texts, strict=True):
                    decoded = [text.decode("utf-8") for text in texts]
                    yield from (text[:chars] for text in decoded)
                    chars -= sum(map(len, decoded))
                    if chars <= 0:
                        return


def _make_shards(config: PreprocessConfig, task: EncodeTask) -> set[int]:
    """Make the shards that are not finished, or this run's share of them; then those that others left.

    Returns the shards that were made here.
    """
    chosen = range(len(task.shards))[config.shard_index or 0 :: config.num_shards or 1]
    todo = [shard for shard in chosen if not task.folder.is_finished(shard)]
    if len(todo) < len(chosen):
        get_logger(__name__).info("%d of %d shards are finished already", len(chosen) - len(todo), len(chosen))
    progress = Progress("tokenise", task.num_bytes * len(todo) / len(task.shards) / 1e6, "MB")
    made: set[int] = set()
    num_bad = 0
    with SampleChecks(task, sorted({*chosen} - {*todo})) as checks:
        for is_second_pass in (False, True):
            task.wait = is_second_pass
            for shard, outcome in run_parallel(
                task,
                todo,
                config.workers,
                on_report=lambda num_bytes: progress.update(num_bytes / 1e6),
                doing="documents were tokenised",
            ):
                made |= {shard} if outcome.is_made else set()
                if outcome.sample is not None:
                    checks.add(shard, outcome.sample)
                num_bad += outcome.bad
                _check_bad(num_bad, task)
            if config.shard_index is not None:
                break
            todo = [shard for shard in todo if not task.folder.is_finished(shard)]
            if not todo or task.folder.plan() is None:
                break
            get_logger(__name__).info("waiting for %d shards that another process is making", len(todo))
    progress.close()
    return made


def _check_bad(num_bad: int, task: EncodeTask) -> None:
    """Raise InputError where more records are bad than were allowed."""
    limit = task.max_bad_records
    if limit is not None and num_bad > limit:
        raise InputError(
            f"{num_bad:,} records are bad so far, more than --max-bad-records {limit:,}; they are listed in the "
            f".skip files of {task.folder.path}"
        )


def _keep_or_remove(work: WorkFolder, *, is_share: bool) -> None:
    """Say what a failed run leaves, if anything; an empty folder goes, unless others may be at work in it."""
    try:
        work.check_plan()
    except LedomError:  # it is gone, or another command's now
        return
    finished = work.num_finished()
    if not finished and not is_share and not work.is_shared():
        work.remove()
        return
    get_logger(__name__).warning(
        "%d of %d shards are finished and stay in %s; the same command goes on from there",
        finished,
        len(work.adopted["shards"]),
        work.path,
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
