"""Our flags beside Megatron's, presets turned into Megatron's defaults, and checks across flags.

The order of precedence, strongest first: a flag on the command line, what the device
needs, what follows from `--run-dir`, the model of a checkpoint (`--use-checkpoint-args`),
the preset, Megatron's own default. Megatron's parser and validation stay in charge; this
module only sets defaults on that parser and refuses, with a sentence, what Megatron would
refuse with an assertion.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_ledom.engine.budget import as_data_path, parse_budgets
from megatron_ledom.engine.device import Device, device_defaults, has_fused_gradients, has_transformer_engine
from megatron_ledom.engine.flags import add_ledom_arguments
from megatron_ledom.engine.precision import check_precision, precision_defaults
from megatron_ledom.engine.presets import BOOKKEEPING, PRESETS, get_preset
from megatron_ledom.errors import UsageError

ASYNC_SAVE: dict[str, Any] = {
    # Saves go on while the run does. "mcore" is Megatron's own writer: with "nvrx", its default, a checkpoint can
    # only be loaded where NVIDIA's package is installed too.
    "async_save": True,
    "use_persistent_ckpt_worker": True,
    "async_strategy": "mcore",
}

SUPERSEDED_BY: dict[str, tuple[str, ...]] = {
    # Naming the key on the command line drops these preset defaults: Megatron wants one or the other.
    "train_samples": ("train_iters",),
    "lr_warmup_iters": ("lr_warmup_fraction",),
    "lr_warmup_samples": ("lr_warmup_fraction",),
    "train_data_path": ("split",),
    "valid_data_path": ("split",),
    "test_data_path": ("split",),
    "per_split_data_args_path": ("split",),
    "reset_attention_mask": ("create_attention_mask_in_dataloader",),  # such a mask has to come from the loader
    "pack_pairs": ("create_attention_mask_in_dataloader",),
}

MODEL_ARGUMENTS: tuple[str, ...] = (
    # What decides the function that weights compute. Megatron compares three of them at load, and its
    # --use-checkpoint-args leaves out the norm's epsilon and every scaling of the rotary positions.
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention"),
    *("num_query_groups", "kv_channels", "normalization", "layernorm_epsilon"),
    *("swiglu", "add_bias_linear", "add_qkv_bias", "position_embedding_type", "rotary_base", "rotary_percent"),
    *("rotary_interleaved", "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor"),
    *("untie_embeddings_and_output_weights", "num_experts", "multi_latent_attention", "qk_layernorm"),
)

ALONG_WITH_MODEL: tuple[str, ...] = (
    # Taken from a checkpoint beside those, and free to change. Megatron's own dropout is 0.1.
    *("max_position_embeddings", "attention_dropout", "hidden_dropout", "init_method_std"),
)
USE_CHECKPOINT = "--use-checkpoint-args"

NOT_WIRED: dict[str, str] = {
    # Megatron's parser accepts these, but another entry script of its carries them out; here they would do nothing.
    "hybrid_context_parallel": "batches are not cut over context-parallel ranks",
    "dataloader_inter_document_masking": "the forward step passes no packed-sequence boundaries",
    "fim_data": "fill-in-the-middle rewrites documents, in either direction, after they were checked",
    "sft": "conversations are not a dataset here",
    "hybrid_layer_pattern": "the model is Megatron's GPTModel",
    "perform_rl_step": "there is no reinforcement learning here",
    "save_retain_interval": "--keep-last and --keep-every say which checkpoints stay",
    "verify_integrity": "every checkpoint is hashed and compared without it",
}


def build_front_parser() -> argparse.ArgumentParser:
    """Return the light parser: our flags alone, without importing Megatron."""
    parser = argparse.ArgumentParser(
        description="Train a LEDOM model with Megatron's pretrain(), on CUDA or on the CPU.",
        epilog="Start it with torchrun --nproc-per-node N tools/pretrain.py ...; Megatron's own flags stand beside "
        "these (--help-megatron lists them); the few that this tool cannot carry out are refused by name.",
        allow_abbrev=False,
    )
    add_ledom_arguments(parser)
    parser.add_argument("--help-megatron", action="store_true", help="list Megatron's own flags as well, and exit")
    return parser


def named_on_command_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Return the `dest` of every flag of `parser` that stands in `argv`."""
    options = {option: action.dest for action in parser._actions for option in action.option_strings}
    return {options[word.split("=", 1)[0]] for word in argv if word.split("=", 1)[0] in options}


def build_defaults(
    front: argparse.Namespace, device: Device, named: set[str], model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect what is set on Megatron's parser before it reads the command line.

    Args:
        front: our flags, parsed.
        device: the resolved device.
        named: the arguments that the command line names (they win by themselves, but
            supersede some preset defaults).
        model: arguments that a checkpoint decides.
    """
    defaults = dict(get_preset(front.preset).settings if front.preset else BOOKKEEPING) | ASYNC_SAVE
    defaults |= model or {}
    defaults |= precision_defaults(front.precision, device)
    if not {"data_path", "data_budget"} & named and {"train_data_path", "mock_data"} & named:
        defaults.pop("split", None)
    for name in named:
        for superseded in SUPERSEDED_BY.get(name, ()):
            defaults.pop(superseded, None)
    if front.data_budget:
        defaults["data_path"] = as_data_path(parse_budgets(front.data_budget))
    if front.run_dir is not None:
        defaults["save"] = str(front.run_dir / "checkpoints")
        defaults["tensorboard_dir"] = str(front.run_dir / "tensorboard")
        if (front.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").is_file():
            defaults["load"] = defaults["save"]
    defaults |= device_defaults(device, has_transformer_engine(), has_fused_gradients())
    return defaults


def parse_arguments(argv: Sequence[str], device: Device, model: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Parse the whole command line with Megatron's parser and check it; nothing is created yet.

    Args:
        argv: the arguments without the program's name.
        device: the resolved device; on "cpu" the engine must be installed already.
        model: argument name to value, from a checkpoint: weaker than a flag, stronger than a preset.

    Returns:
        Megatron's namespace before its own validation, with our flags in it.

    Raises:
        UsageError: flags that do not fit together.
        SystemExit: argparse's own refusals.
    """
    from megatron.training.arguments import parse_args

    with _command_line(argv):
        args: argparse.Namespace = parse_args(_extra_arguments(argv, device, model))
    check_arguments(args, device)
    return args


def set_megatron_arguments(
    argv: Sequence[str], device: Device, model: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse again, let Megatron validate, and make the result Megatron's global arguments.

    This creates Megatron's tokenizer and TensorBoard writer. Our own values are left in
    the namespace as plain strings, so that a checkpoint, which stores it, holds no class
    of ours.

    Raises:
        UsageError: Megatron's validation refuses; with its words.
    """
    from megatron.training.arguments import parse_and_validate_args

    with _command_line(argv):
        try:
            args: argparse.Namespace = parse_and_validate_args(_extra_arguments(argv, device, model))
        except AssertionError as error:
            reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # some assertions have no words
            raise UsageError(f"Megatron refuses these arguments: {reason}") from error
    args.run_dir = str(args.run_dir)
    args.device = device
    return args


def _extra_arguments(
    argv: Sequence[str], device: Device, model: Mapping[str, Any] | None
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """Megatron's hook for more arguments: add ours and set the defaults of preset, model, run directory and device."""
    front, _ = build_front_parser().parse_known_args(argv)

    def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add what this project knows to Megatron's parser."""
        add_ledom_arguments(parser)
        named = named_on_command_line(parser, argv)
        defaults = build_defaults(front, device, named, model or {})
        without_flag = {name: defaults.pop(name) for name in ("padded_vocab_size",) if name in defaults}
        _add_negations(parser, defaults)
        _check_names(parser, defaults)
        parser.set_defaults(**defaults, **without_flag)
        return parser

    return extend


def build_saved_arguments(settings: dict[str, Any]) -> argparse.Namespace:
    """Return Megatron's arguments as a checkpoint holds them, for a checkpoint that no run has written.

    Args:
        settings: argument name (`dest`) to value; everything else is Megatron's default, or ours.
            Names that no flag has (`padded_vocab_size`) are taken as well.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fused kernels, which a conversion does not need
        from megatron.training.arguments import add_megatron_arguments

    parser = add_ledom_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args([])
    vars(args).update(settings)
    return args


def print_megatron_help() -> None:
    """Print the help of all flags, Megatron's and ours."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(prog="pretrain.py", allow_abbrev=False)
    add_ledom_arguments(add_megatron_arguments(parser))
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):  # megatron-core 0.19.2 has bare percent signs in its help
            action.help = (action.help or "").replace("%", "%%")
    parser.print_help()


def check_arguments(args: argparse.Namespace, device: Device) -> None:
    """Refuse what cannot run, before Megatron starts and in words.

    Raises:
        UsageError: naming the flags, what was found and what to do.
    """
    for check in (_check_required, _check_wired, _check_data, _check_saves):
        check(args)
    if args.data_report_only:  # the layout is that of another machine
        return
    for check in (_check_layout, _check_model_fits_layout, _check_batch, _check_interleaving):
        check(args)
    if device == "cpu":
        _check_cpu(args)
    check_precision(args, device, has_transformer_engine())


def _check_required(args: argparse.Namespace) -> None:
    if args.run_dir is None:
        raise UsageError("--run-dir RUN is missing: it says where configuration, logs and checkpoints go")
    if args.preset is None and args.num_layers is None:
        raise UsageError(
            f"no model: give --preset {'|'.join(PRESETS)}, {USE_CHECKPOINT} with a checkpoint, or Megatron's model "
            "flags (--num-layers ...)"
        )
    if not args.mock_data and args.tokenizer_type is None:
        raise UsageError("--tokenizer-type is missing: name the one the data was made with (it is in its manifest)")


def _check_wired(args: argparse.Namespace) -> None:
    for name, reason in NOT_WIRED.items():
        if getattr(args, name, None):
            raise UsageError(f"--{name.replace('_', '-')} is not supported by this tool: {reason}. Drop it")
    if args.context_parallel_size > 1:
        raise UsageError(
            f"--context-parallel-size {args.context_parallel_size} is not supported by this tool: batches are not cut "
            "over context-parallel ranks. Use tensor, pipeline and data parallelism"
        )
    for flag, is_asked in (("--reset-attention-mask", args.reset_attention_mask), ("--pack-pairs", args.pack_pairs)):
        if is_asked and not args.create_attention_mask_in_dataloader:
            raise UsageError(f"{flag} does nothing with --no-create-attention-mask-in-dataloader: drop one")
        if is_asked and args.transformer_impl != "local":
            raise UsageError(
                f"{flag} needs --transformer-impl local: Transformer Engine's causal attention takes no mask"
            )


def _check_data(args: argparse.Namespace) -> None:
    if not args.data_budget:
        return
    named = [args.train_data_path, args.valid_data_path, args.test_data_path, args.data_args_path]
    if any(named) or args.per_split_data_args_path or args.mock_data:
        raise UsageError("--data-budget names the data by itself: drop the other flags that name data")
    if args.data_path != as_data_path(parse_budgets(args.data_budget)):
        raise UsageError("--data-budget takes the place of --data-path and its weights: give one of the two")


def _check_saves(args: argparse.Namespace) -> None:
    for flag, number in (("--keep-last", args.keep_last), ("--keep-every", args.keep_every)):
        if number is not None and number < 1:
            raise UsageError(f"{flag} {number}: give 1 or more")
    if args.keep_every is not None and args.keep_last is None:
        raise UsageError("--keep-every says what stays besides --keep-last K: give both")
    if args.rerun_mode == "report_stats" and args.bad_numbers != "megatron":
        raise UsageError(
            "--rerun-mode report_stats needs --bad-numbers megatron: the other policies do not rerun steps"
        )
    if args.ckpt_format != "torch_dist":
        raise UsageError(f"--ckpt-format {args.ckpt_format} is not supported by this tool: it saves torch_dist")


def _check_layout(args: argparse.Namespace) -> None:
    tensor, pipeline, context = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    ranks = tensor * pipeline * context
    if args.world_size % ranks:
        raise UsageError(
            f"{args.world_size} processes do not fit the layout: --tensor-model-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {pipeline} x --context-parallel-size {context} = {ranks} ranks for one "
            f"copy of the model. Start a multiple of {ranks} processes, or change the layout"
        )


def _check_model_fits_layout(args: argparse.Namespace) -> None:
    tensor = args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for flag, value in (
        ("--num-attention-heads", args.num_attention_heads),
        ("--ffn-hidden-size", args.ffn_hidden_size),
    ):
        if value is not None and value % tensor:
            raise UsageError(f"{flag} {value} is not divisible by --tensor-model-parallel-size {tensor}")
    if groups % tensor and tensor % groups:
        raise UsageError(
            f"--num-query-groups {groups} and --tensor-model-parallel-size {tensor}: one must divide the other"
        )
    if args.sequence_parallel and args.seq_length is not None and args.seq_length % tensor:
        raise UsageError(
            f"--sequence-parallel cuts --seq-length {args.seq_length} into {tensor} parts, which are not whole"
        )


def _check_batch(args: argparse.Namespace) -> None:
    if args.global_batch_size is None or args.micro_batch_size is None or args.rampup_batch_size is not None:
        return
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    data_parallel = args.world_size // ranks
    if args.global_batch_size % (args.micro_batch_size * data_parallel):
        raise UsageError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {data_parallel} data-parallel ranks"
        )


def _check_interleaving(args: argparse.Namespace) -> None:
    per_stage = args.num_layers_per_virtual_pipeline_stage
    if per_stage is None or args.num_layers is None:
        return
    pipeline = args.pipeline_model_parallel_size
    if pipeline < 2:
        raise UsageError("--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size 2 or more")
    if (args.num_layers // pipeline) % per_stage:
        raise UsageError(
            f"--num-layers {args.num_layers} over {pipeline} stages cannot be cut into virtual stages of {per_stage}"
        )


def _check_cpu(args: argparse.Namespace) -> None:
    unavailable = {
        "--transformer-impl transformer_engine": args.transformer_impl != "local",
        "--fp16": args.fp16,
        "--distributed-backend other than gloo": args.distributed_backend != "gloo",
    }
    for flag, is_asked in unavailable.items():
        if is_asked:
            raise UsageError(f"{flag} is not available with the CPU engine: drop it, or run with --device cuda")


def _check_names(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(defaults) - known)
    assert not unknown, f"this megatron-core has no arguments {unknown}: the preset or CPU table is for another version"


def _add_negations(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """Give every switch that a default has thrown a flag that throws it back.

    `--swiglu`, on by a preset, gets `--no-swiglu`; `--disable-bias-linear`, whose
    argument `add_bias_linear` is off by a preset, gets `--add-bias-linear`.
    """
    switches = {
        action.dest: (action.option_strings[0], action.const)
        for action in parser._actions
        if action.nargs == 0 and isinstance(action.const, bool)
    }
    for dest, value in defaults.items():
        flag, const = switches.get(dest, ("", None))
        if not flag or value is not const:
            continue
        opposite = f"--no-{flag.removeprefix('--')}" if const else f"--{dest.replace('_', '-')}"
        if opposite not in parser._option_string_actions:
            action = "store_false" if const else "store_true"
            parser.add_argument(opposite, dest=dest, action=action, help=f"undo {flag}, which is set by default here")


@contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Show `argv` to Megatron, whose parser reads `sys.argv`.

    `--use-checkpoint-args` is carried out here, by the `model` of the two functions above: Megatron's own
    way leaves out arguments that decide the function, and overrules flags that the command line names.
    """
    saved = sys.argv
    sys.argv = [saved[0], *(word for word in argv if word != USE_CHECKPOINT)]
    try:
        yield
    finally:
        sys.argv = saved
