"""The story of a training run: check, then hand three functions to Megatron's `pretrain()`.

    arguments -> device -> engine -> guards -> record -> pretrain(datasets, model, step)

There is no training loop here. Which way the text runs is in the data: reversed
documents are ordinary sequences to the network, so the forward step below is that of
any causal language model. With `--attention ledom` samples come in natural order and the
attention and the positions run the other way; the forward step is still the same. Legend: B batch, S sequence.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ledom.checkpoint.commit import Keep
from megatron_ledom.data.blend import plan_blend
from megatron_ledom.data.order import EPOCHS
from megatron_ledom.data.tokenizers import check_engine_tokenizer
from megatron_ledom.engine import cpu, wheel
from megatron_ledom.engine.arguments import (
    build_front_parser,
    parse_arguments,
    print_megatron_help,
    set_megatron_arguments,
)
from megatron_ledom.engine.device import resolve_device
from megatron_ledom.engine.rendezvous import Agreement
from megatron_ledom.engine.saving import background_save_risk
from megatron_ledom.engine.watching import watched
from megatron_ledom.log import get_logger
from megatron_ledom.train.datasets import (
    build_datasets_provider,
    length_from_budget,
    num_train_samples,
    report_plan,
    train_sources,
)
from megatron_ledom.train.guards import RunFacts, check_run, check_schedule
from megatron_ledom.train.hang_watch import HangWatch
from megatron_ledom.train.lifecycle import StopRequest, end_of_run
from megatron_ledom.train.order_guard import settle_order, written_order
from megatron_ledom.train.resume import settle_checkpoint
from megatron_ledom.train.run_directory import record_launch
from megatron_ledom.train.run_lock import hold_checkpoints
from megatron_ledom.train.safety import Safety, hang_timeout_s
from megatron_ledom.train.saves import Saves
from megatron_ledom.train.shadow import Shadow
from megatron_ledom.train.starting_point import check_same_model, model_from_checkpoint, vocabulary_rows
from megatron_ledom.train.watch import Watch

if TYPE_CHECKING:
    import torch

    from megatron_ledom.model.attention import AttentionPlan
    from megatron_ledom.model.layers import LayerPlan

ForwardStep = Callable[[Any, Any], tuple[Any, Callable[..., Any]]]
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


@dataclass(frozen=True)
class Launch:
    """All that a run has settled before Megatron starts.

    Attributes:
        args: Megatron's global arguments.
        facts: data and checkpoints.
        attention: what computes attention.
        layers: what computes norms, SwiGLU and the loss.
        safety: what watches over the steps.
        watch: what the run tells of itself.
        stop: whether the process has been asked to stop.
        started: when the process started, seconds since the epoch.
    """

    args: argparse.Namespace
    facts: RunFacts
    attention: AttentionPlan
    layers: LayerPlan
    safety: Safety
    watch: Watch
    stop: StopRequest
    started: float


def main(argv: Sequence[str], stop: StopRequest | None = None) -> int:
    """Train with the given command line; the entry of `tools/pretrain.py`.

    Args:
        argv: the arguments without the program's name.
        stop: whether the process has been asked to stop; without it signals do what they always do.

    Returns:
        0, or `lifecycle.STOPPED_STATUS` for a run that was stopped by a signal and can go on.

    Raises:
        LedomError: arguments, data or a checkpoint that do not fit; nothing was started.
    """
    started = time.time()
    front, _ = build_front_parser().parse_known_args(argv)
    device = resolve_device(front.device)
    if device == "cpu":
        cpu.prepare_environment()
    if front.help_megatron:
        print_megatron_help()
        return 0
    if device == "cpu":
        cpu.install()
    wheel.complete_installation()
    from megatron.training import get_tokenizer

    from megatron_ledom.model.attention import plan_attention
    from megatron_ledom.model.layers import plan_layers

    agreement = Agreement()
    settled = settle_checkpoint(argv, agreement)
    argv = settled.argv
    model = model_from_checkpoint(argv)
    parsed = parse_arguments(argv, device, model)
    facts = check_run(parsed, settled.verified)  # before anything is created
    if parsed.data_report_only:
        print_data_report(parsed, argv, facts)
        return 0
    plan, layers = plan_attention(parsed, device), plan_layers(parsed, device)
    defaults = model | vocabulary_rows(parsed, facts.hf_origin) | length_from_budget(parsed, argv)
    args = set_megatron_arguments(argv, device, defaults)
    for flag, checkpoint in facts.checkpoints.items():
        check_same_model(f"{flag} {checkpoint.folder}", checkpoint.args, args, argv)
    if facts.tokenizer is not None:
        check_engine_tokenizer(facts.tokenizer, get_tokenizer())
    if facts.resumed is not None:
        check_schedule(args, facts.resumed)
    settle_order(args, facts.datasets, facts.resumed)
    args.tokenizer_fingerprint = facts.tokenizer_fingerprint  # goes into every checkpoint, as `direction` does
    args.hf_origin = facts.hf_origin
    start = start_of_launch(args, facts)
    if args.rank == 0:
        if facts.datasets:
            get_logger(__name__).info(report_plan(args, facts.datasets, args.data_order))
        if args.save:  # a first launch: there was nothing to hold before
            Path(args.save).mkdir(parents=True, exist_ok=True)
            hold_checkpoints(Path(args.save))
        record_launch(args, argv, facts.datasets, start)
    save = Path(args.save) if args.save else None
    stop = stop or StopRequest()
    stop.arm(args, agreement)
    sources, num_samples = train_sources(args, facts.datasets, args.data_order), num_train_samples(args)
    watch = Watch(args, plan_blend(sources, num_samples, args.seq_length), num_samples, start, started)
    try:
        with (
            Saves(save, Keep(args.keep_last, args.keep_every), args.rank, settled.token) as saves,
            HangWatch(hang_timeout_s(args), Path(args.run_dir)) as hangs,  # not over the last commit
            watch,
        ):
            safety = Safety(args, facts, agreement, saves, hangs)
            run_pretraining(Launch(args, facts, plan, layers, safety, watch, stop, started))
    except SystemExit as early:  # how Megatron leaves before the last step
        if early.code:
            raise
    return end_of_run(stop, args)


def start_of_launch(args: argparse.Namespace, facts: RunFacts) -> dict[str, int]:
    """What the run has behind it when this launch begins: `steps` and `samples`."""
    if facts.resumed is None or args.finetune:
        return {"steps": 0, "samples": 0}
    samples = getattr(facts.resumed, "consumed_train_samples", 0)
    return {"steps": facts.checkpoints["--load"].iteration, "samples": int(samples)}


def print_data_report(parsed: argparse.Namespace, argv: Sequence[str], facts: RunFacts) -> None:
    """Print what this command would read of each source, on rank 0."""
    vars(parsed).update(length_from_budget(parsed, argv))
    written = None if parsed.finetune else facts.resumed
    data_order = parsed.data_order or (EPOCHS if written is None else written_order(written))
    if parsed.rank == 0:
        print(report_plan(parsed, facts.datasets, data_order))


def run_pretraining(launch: Launch) -> None:
    """Hand datasets, model and forward step to Megatron; `launch.args` are its globals already."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from megatron_ledom.model.cross_entropy import vocab_parallel_cross_entropy
    from megatron_ledom.model.precision import plan_emulation
    from megatron_ledom.model.spec import layer_spec_builder
    from megatron_ledom.ops.kernels import describe_kernels

    args, plan, layers, safety = launch.args, launch.attention, launch.layers, launch.safety
    get_logger(__name__).info(
        "%s model on %s: TP %d x PP %d x DP %d, run directory %s",
        *(args.direction, args.device, args.tensor_model_parallel_size, args.pipeline_model_parallel_size),
        *(args.data_parallel_size, args.run_dir),
    )
    if args.device == "cuda" and args.transformer_impl == "local":
        get_logger(__name__).warning(
            "Megatron's local layers: without Transformer Engine there is no FP8 and attention may be slow"
        )
    risk = background_save_risk(args.device, args.async_save and args.save is not None, os.environ)
    if risk and args.rank == 0:
        get_logger(__name__).warning("warning: %s", risk)
    get_logger(__name__).info("attention: %s (%s)", plan.kind, plan.reason)
    get_logger(__name__).info("norms, SwiGLU and loss: %s (%s)", layers.kind, layers.reason)
    if layers.is_ours:
        cpu.use_cross_entropy(vocab_parallel_cross_entropy)
    get_logger(__name__).info("%s", describe_kernels())
    emulation = plan_emulation(args)
    if emulation is not None:
        get_logger(__name__).info("precision: %s, emulated in the linear layers", args.precision)
    model_config = gpt_config_from_args(args)
    if args.spec is None:
        model_config.transformer_layer_spec = layer_spec_builder(plan, layers, emulation)
    shadow = Shadow(args, emulation, launch.watch.record, launch.facts.resumed)
    set_startup_timestamps(program_start=launch.started, main_entry=time.time())
    with watched(launch.watch):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            safety.keeping_documents(build_datasets_provider(launch.facts.datasets, plan, launch.stop)),
            ModelType.encoder_or_decoder,
            safety.watching(build_forward_step(shadow)),
        )
    torch.distributed.destroy_process_group()


def next_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | None]:
    """Take a micro-batch to the device.

    Returns:
        tokens, labels, position_ids int64 [B, S]; loss_mask float [B, S]; attention_mask bool
        [B, 1, S, S], True where a query must not look, or the bounds of documents int32 [B, 2, S], or None
        where the datasets make none.
    """
    batch = next(data_iterator)
    return {key: batch[key].cuda(non_blocking=True) if key in batch else None for key in BATCH_KEYS}


def build_forward_step(shadow: Shadow | None = None) -> ForwardStep:
    """Return Megatron's forward step for this run.

    Args:
        shadow: compares FP8 with BF16 now and then; None for a run without.
    """
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    from megatron_ledom.model.loss import build_loss_function, mean_loss

    args = get_args()

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Callable[[torch.Tensor], Any]]:
        """Run one micro-batch through this pipeline stage.

        Args:
            data_iterator: of this data-parallel rank; middle stages read from it only for an attention mask.
            model: this stage's chunk of the network.

        Returns:
            The stage's output (losses [B, S] on the last stage, hidden states elsewhere)
            and the function that turns the last one into (sum, count, report).
        """
        is_first = get_attr_wrapped_model(model, "pre_process")
        is_last = get_attr_wrapped_model(model, "post_process")
        has_use = is_first or is_last or args.create_attention_mask_in_dataloader
        batch: dict[str, Any] = next_batch(data_iterator) if has_use else dict.fromkeys(BATCH_KEYS)

        def run_model() -> Any:
            return model(
                batch["tokens"],
                batch["position_ids"],
                batch["attention_mask"],
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )

        is_shadowed = shadow is not None and shadow.before(model, lambda: mean_loss(batch["loss_mask"], run_model()))
        output = run_model()
        if shadow is not None and is_shadowed:
            shadow.after(model, mean_loss(batch["loss_mask"], output))
        return output, build_loss_function(batch["loss_mask"], check_finite=args.check_for_nan_in_loss_and_grad)

    return forward_step
