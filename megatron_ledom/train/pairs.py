"""What a run on questions and answers may not be asked for, because it would do nothing or something else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from megatron_ledom.data import order
from megatron_ledom.data.dataset import CheckedDataset
from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger


def check_pairs(args: argparse.Namespace, datasets: Mapping[str, CheckedDataset]) -> None:
    """Refuse flags that do not go with pairs, and pairs beside texts; say what is learnt.

    Raises:
        UsageError: naming the flag, or a dataset of each kind.
    """
    pairs = [prefix for prefix, dataset in datasets.items() if dataset.pairs is not None]
    texts = [prefix for prefix in datasets if prefix not in pairs]
    if not pairs:
        if args.pack_pairs:
            raise UsageError("--pack-pairs: the data holds no pairs. Make them with tools/preprocess_pairs.py")
        return
    if texts:
        raise UsageError(
            f"{pairs[0]} holds pairs and {texts[0]} texts: their samples are made differently. Train on one kind, "
            "then on the other (--pretrained-checkpoint)"
        )
    unfit = {
        "--data-order megatron": args.data_order == order.MEGATRON,
        "--data-budget": bool(args.data_budget),
        "--reset-position-ids": args.reset_position_ids,
        "--reset-attention-mask": args.reset_attention_mask,
        "--eod-mask-loss": args.eod_mask_loss,
    }
    for flag, is_asked in unfit.items():
        if is_asked:
            raise UsageError(f"{flag} does not go with pairs ({pairs[0]}), which are never cut or joined. Drop it")
    for prefix in pairs:
        record = datasets[prefix].pairs
        assert record is not None
        get_logger(__name__).info("%s: questions and answers, the loss on %s", prefix, record.loss_on)
