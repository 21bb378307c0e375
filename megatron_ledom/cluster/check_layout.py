"""Does a layout compute what one rank computes? The same layout at reduced width, against one rank, or no launch.

    one rank    0 ------ 19            a start with filled moments, saved
    one rank             19 - 20 ---- 39
    the layout           19 - 20 ---- 39    the same start, resharded; real gloo ranks, the training entry itself
                               |       |
                          gradients  losses of all twenty steps

The gradient of step 20 is read back from Adam's first moment in the checkpoints, where each tensor is whole whatever
the layout: g = (m_20 - beta m_19) / (1 - beta), every parameter of it. Everything runs on the CPU in fp32, where the
order of sums is the only difference that a right layout makes.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.cluster.forked_ranks import run_ranks
from megatron_ledom.cluster.small_twin import CHECKED_STEPS, START_STEPS, SmallTwin, build_twin, one_rank_flags
from megatron_ledom.errors import UsageError
from megatron_ledom.log import get_logger
from megatron_ledom.train.preload import preload

LOSS_BOUND = 1e-5
"""Largest relative difference of a step's loss; right layouts stay below 1e-6."""
GRADIENT_BOUND = 1e-4
"""Largest difference of a gradient, as a share of the tensor's largest element; right layouts stay below 1e-5."""
FALL = 0.1
"""By so many nats the loss must fall, else equality says little."""
MOMENT = "exp_avg"
BETA = 0.9
Work = Callable[[Sequence[str]], object]


@dataclass(frozen=True)
class Agreement:
    """How far a layout is from one rank.

    Attributes:
        layout: in words.
        num_ranks: processes that ran it.
        losses: of the checked steps: (one rank's, the layout's).
        worst_loss: largest relative difference of a step's loss.
        gradients: tensor -> difference as a share of its largest element, largest first.
        notes: what the check doesn't show.
    """

    layout: str
    num_ranks: int
    losses: list[tuple[float, float]]
    worst_loss: float
    gradients: dict[str, float]
    notes: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Every bound that does not hold, in words."""
        faults = []
        if not self.worst_loss <= LOSS_BOUND:
            step, (one, other) = max(enumerate(self.losses), key=lambda item: abs(item[1][1] / item[1][0] - 1))
            faults.append(
                f"loss of step {START_STEPS + 1 + step}: {one:.7f} on one rank, {other:.7f} in this layout "
                f"({self.worst_loss:.1e} relative, the bound is {LOSS_BOUND:.0e})"
            )
        wrong = {name: value for name, value in self.gradients.items() if not value <= GRADIENT_BOUND}
        if wrong:
            name, value = next(iter(wrong.items()))
            faults.append(
                f"gradients of {len(wrong)} of {len(self.gradients)} tensors differ, most that of {name}: {value:.1e} "
                f"of its largest element, the bound is {GRADIENT_BOUND:.0e}"
            )
        fall = self.losses[0][0] - self.losses[-1][0]
        if not fall >= FALL:
            faults.append(f"the loss fell by {fall:.3f} only, so that equal losses say little")
        return faults


@dataclass(frozen=True)
class Reference:
    """What one rank made: the folder of its start, and of its run."""

    start: Path
    run: Path


def check_layout(argv: Sequence[str], world_size: int, *, max_ranks: int = 8, timeout_s: float = 900) -> Agreement:
    """Check the layout of the run that `argv` describes.

    Args:
        argv: flags of `tools/pretrain.py`, preset included; data, batch and model sizes are replaced.
        world_size: GPUs of the run.
        max_ranks: processes that may run here.
        timeout_s: for each of the three runs.

    Raises:
        UsageError: the layout does not fit, or takes too many processes.
        ParityError: a rank failed; with its last lines.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="check-layout-") as scratch:
        twin, one = reduce_run(argv, world_size, max_ranks)
        reference = run_reference(twin, one, Path(scratch), timeout_s)
        return compare_layout(twin, reference, Path(scratch) / "layout", timeout_s)


def reduce_run(argv: Sequence[str], world_size: int, max_ranks: int) -> tuple[SmallTwin, list[str]]:
    """The small twin of a run, and the flags of its layout on one rank."""
    from megatron_ledom.engine.arguments import parse_arguments
    from megatron_ledom.engine.fake_ranks import rank_environment

    words = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1023", "--run-dir", "check"]
    with rank_environment(0, world_size):
        args = parse_arguments([*argv, *words, "--data-report-only"], "cpu")
    if args.num_experts is not None or args.multi_latent_attention:
        raise UsageError("--num-experts, --multi-latent-attention: only dense, ordinary layers are checked")
    if args.optimizer != "adam":
        raise UsageError(f"--optimizer {args.optimizer}: gradients are read from Adam's moments; check with adam")
    return build_twin(argv, args, world_size, max_ranks), one_rank_flags(args)


def run_reference(twin: SmallTwin, one: Sequence[str], folder: Path, timeout_s: float) -> Reference:
    """Train the twin on one rank, twice: to the common start, and from there on."""
    start, run = folder / "start", folder / "one-rank"
    exits = ["--exit-interval", str(START_STEPS), "--save-interval", "10000"]
    train([*twin.flags, *one, *exits], 1, start, timeout_s)
    train([*twin.flags, *one, *_continue(start)], 1, run, timeout_s)
    return Reference(start, run)


def compare_layout(
    twin: SmallTwin, reference: Reference, folder: Path, timeout_s: float, work: Work | None = None
) -> Agreement:
    """Train the twin in its layout from the common start and compare it with one rank.

    `work` stands in for the training entry, `megatron_ledom.train.pretrain.main`, in the ranks of the layout.
    """
    train([*twin.flags, *twin.layout, *_continue(reference.start)], twin.num_ranks, folder, timeout_s, work)
    losses = list(zip(_losses(reference.run), _losses(folder), strict=True))
    worst = max(abs(other / one - 1) for one, other in losses)
    gradients = compare_gradients(reference, folder)
    return Agreement(twin.describes, twin.num_ranks, losses, worst, gradients, twin.notes)


def train(flags: Sequence[str], num_ranks: int, run: Path, timeout_s: float, work: Work | None = None) -> None:
    """Train in forked ranks, as `tools/pretrain.py` does; everything goes below the folder `run`."""
    from megatron_ledom.train.pretrain import main

    argv = [*flags, "--run-dir", str(run), "--data-cache-path", str(run.parent / "data-cache")]
    get_logger(__name__).info("%s: %d rank%s", run.name, num_ranks, "" if num_ranks == 1 else "s")
    run_ranks(num_ranks, functools.partial(work or main, argv), run / "logs", timeout_s=timeout_s)


def _continue(start: Path) -> list[str]:
    return ["--load", str(start / "checkpoints"), "--save-interval", str(START_STEPS + 1)]


def _losses(run: Path) -> list[float]:
    from megatron_ledom.train.metrics import TRAIN_LOSS, read_scalars

    first, last = START_STEPS + 1, START_STEPS + CHECKED_STEPS
    return [value for step, value in read_scalars(run, TRAIN_LOSS).items() if first <= step <= last]


def compare_gradients(reference: Reference, layout: Path) -> dict[str, float]:
    """Compare the gradients of the first checked step, tensor by tensor; a checkpoint stacks the layers.

    Returns:
        Name -> largest difference as a share of the largest element of one rank's; largest first.
    """
    from megatron_ledom.checkpoint import Checkpoint

    step = START_STEPS + 1
    before = Checkpoint.open(reference.start / "checkpoints", START_STEPS)
    one = Checkpoint.open(reference.run / "checkpoints", step)
    other = Checkpoint.open(layout / "checkpoints", step)
    names = [name for name in one.tensor_names() if re.search(rf"\b{MOMENT}\b", name)]
    assert names and set(names) <= set(other.tensor_names()), (names[:3], other.tensor_names()[:3])
    found = {}
    for name in names:
        old = before.read(name).double()
        expected = (one.read(name).double() - BETA * old) / (1 - BETA)
        actual = (other.read(name).double() - BETA * old) / (1 - BETA)
        largest = expected.abs().max().item() or 1.0
        found[name.split(f"{MOMENT}.", 1)[-1]] = (actual - expected).abs().max().item() / largest
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def format_agreement(agreement: Agreement) -> str:
    """The result as text: numbers, what was not shown, and the verdict."""
    gradient = next(iter(agreement.gradients.items()))
    lines = [
        f"{agreement.layout}: {agreement.num_ranks} ranks against one, "
        f"{len(agreement.losses)} steps from one checkpoint",
        f"  loss       {agreement.losses[0][0]:.4f} -> {agreement.losses[-1][0]:.4f}, largest relative difference "
        f"{agreement.worst_loss:.1e} (bound {LOSS_BOUND:.0e})",
        f"  gradients  {len(agreement.gradients)} tensors, largest difference {gradient[1]:.1e} of a tensor's largest "
        f"element ({gradient[0]}; bound {GRADIENT_BOUND:.0e})",
        *(f"  note: {note}" for note in agreement.notes),
    ]
    faults = agreement.faults
    lines += [f"  FAULT: {fault}" for fault in faults]
    return "\n".join([*lines, "no launch: this layout computes something else" if faults else "the layout is right"])
