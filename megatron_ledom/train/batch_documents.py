"""The documents behind the batch of a step, named while the run goes on: from the datasets that it reads."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_ledom.data.provenance import Tracer
from megatron_ledom.errors import UsageError
from megatron_ledom.train.datasets import Datasets
from megatron_ledom.train.replay import sample_places

MAX_DOCUMENTS = 200
"""More than these are not looked up: a batch of 4 million tokens has thousands. tools/which_documents.py shows all."""


class BatchDocuments:
    """Names documents by file and row.

    Args:
        args: Megatron's namespace.
        datasets: prefix -> what was found out about it.
    """

    def __init__(self, args: argparse.Namespace, datasets: Datasets) -> None:
        self._args, self._datasets = args, datasets
        self._train: Any = None

    def keeping(self, provide: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., tuple[Any, Any, Any]]:
        """Wrap Megatron's dataset provider, to know the training set that it builds."""

        @functools.wraps(provide)  # Megatron looks for `is_distributed`, and for `vp_stage` in the signature
        def keep(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
            built = provide(*args, **kwargs)
            self._train = built[0]
            return built

        return keep

    def name(self, first: int, number: int, places: list[tuple[int, int | None]]) -> list[str]:
        """Name the documents of samples `first` to `first + number` of the run.

        Args:
            first: counted from 0, in the order in which the run reads.
            number: of samples.
            places: (data-parallel rank, micro-batch, or None for each); [] for the whole batch.
        """
        if self._train is None or not self._datasets:
            return []
        args = argparse.Namespace(**vars(self._args) | {"global_batch_size": number})
        tracer, texts = Tracer(self._train, self._datasets), []
        try:
            for position, micro_batch, rank in sample_places(args, first, len(self._train)):
                if places and not {(rank, micro_batch), (rank, None)} & set(places):
                    continue
                for part in tracer.trace(position).parts:
                    row = "" if part.row is None else f", row {part.row:,}"
                    texts.append(
                        f"{part.source or 'source not recorded'}{row} (document {part.document:,}, sample {position:,})"
                    )
                if len(texts) >= MAX_DOCUMENTS:
                    break
        except UsageError as error:  # a loader whose order is not known here
            return [str(error)]
        return texts[:MAX_DOCUMENTS]
