"""How far two models are apart: their logits, block by block, and what their modules gave on the way.

Logits of a large vocabulary are never in memory whole. One side writes its blocks to a
file, vocabulary first, so that any range of ids is one stretch of it; the other side's
blocks are compared with those stretches as they come:

    file   id 0: N floats | id 1: N floats | ... | id V-1: N floats      N = rows x positions

It knows no model: rows are [B, S, ...] tensors in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

TRACE_POSITIONS = 32
"""Positions of each row at which the outputs of modules are kept: 0.1 GB of files for a 7B."""


class LogitFile:
    """The logits of a model on disk, written block by block in the order of ids.

    Args:
        path: of the file.
        shape: (B, S).
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self._shape = path, shape

    def append(self, logits: torch.Tensor) -> None:
        """Write the next block, fp32 [B, S, n]."""
        with self._path.open("ab") as file:
            logits.flatten(0, 1).T.contiguous().numpy().tofile(file)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read the logits of ids `start` to `stop`, fp32 [B, S, stop - start]."""
        import torch

        num = self._shape[0] * self._shape[1]
        values = np.fromfile(self._path, np.float32, count=(stop - start) * num, offset=start * num * 4)
        return torch.from_numpy(values).view(stop - start, *self._shape).permute(1, 2, 0)


class LogitComparison:
    """Two models' logits at the same positions.

    Args:
        ids_model: int64 [B, S], what both read.
        vocab_size: ids from here on are padding, which only the expected logits have.
    """

    def __init__(self, ids_model: torch.Tensor, vocab_size: int) -> None:
        import torch

        self._targets, self._vocab_size = ids_model[:, 1:], vocab_size
        self.max_difference, self.max_logit = 0.0, 0.0
        self.worst_id: int | None = None
        self.worst_place: tuple[int, int] | None = None
        nothing = torch.full(ids_model.shape, -torch.inf)
        self._found_sum, self._expected_sum, self._padding_sum = nothing.clone(), nothing.clone(), nothing.clone()
        self._found_target = torch.full(self._targets.shape, torch.nan)
        self._expected_target = self._found_target.clone()

    def add(self, start: int, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take in the logits of ids from `start` on.

        Args:
            start: first id.
            found: fp32 [B, S, n], without padding.
            expected: fp32 [B, S, m], m >= n.
        """
        import torch

        real, padding = expected[..., : found.shape[-1]], expected[..., found.shape[-1] :]
        if padding.shape[-1]:
            self._padding_sum = torch.logaddexp(self._padding_sum, padding.logsumexp(-1))
        if not found.shape[-1]:
            return
        difference = (found - real).abs().nan_to_num(nan=torch.inf)
        largest, where = difference.flatten().max(0)
        if largest.item() > self.max_difference:
            row, position, column = (int(i) for i in np.unravel_index(where.item(), found.shape))
            self.max_difference, self.worst_id, self.worst_place = largest.item(), start + column, (row, position)
        self.max_logit = max(self.max_logit, real.abs().max().item())
        self._found_sum = torch.logaddexp(self._found_sum, found.logsumexp(-1))
        self._expected_sum = torch.logaddexp(self._expected_sum, real.logsumexp(-1))
        column = self._targets - start
        inside = (column >= 0) & (column < found.shape[-1])
        column = column.clamp(0, found.shape[-1] - 1)[..., None]
        for kept, logits in ((self._found_target, found), (self._expected_target, real)):
            kept[inside] = logits[:, :-1].gather(-1, column).squeeze(-1)[inside]

    @property
    def relative_difference(self) -> float:
        """The largest |difference| over the largest |expected logit|."""
        return self.max_difference / max(self.max_logit, 1e-30)

    def logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log P of each id given those before it, found and expected, each [B, S - 1]; over the real vocabulary."""
        return self._found_target - self._found_sum[:, :-1], self._expected_target - self._expected_sum[:, :-1]

    def padding_probability(self) -> float:
        """The mean probability that the expected model's softmax gives to padding, over all positions."""
        import torch

        return (self._padding_sum - torch.logaddexp(self._padding_sum, self._expected_sum)).exp().mean().item()


@dataclass
class ErrorSum:
    """The error of logits against a reference, as a share of the reference's root mean square."""

    squares: float = 0.0
    reference_squares: float = 0.0

    def add(self, found: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in a block of each."""
        self.squares += (found - reference).double().square().sum().item()
        self.reference_squares += reference.double().square().sum().item()

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the reference; NaN where a logit is not finite."""
        return float(np.sqrt(self.squares / self.reference_squares))


@dataclass
class RowComparison:
    """Every row of two embedding tables, through its product with one random direction: a number a row.

    Ids that no probe holds are compared too, without the two tables being in memory together.
    """

    found: list[torch.Tensor] = field(default_factory=list)
    expected: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def project(rows: torch.Tensor) -> torch.Tensor:
        """The numbers of a block of rows, float64 [n]."""
        import torch

        direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(99))
        return (rows.float() @ direction).double()

    def result(self, vocab_size: int) -> tuple[float, int]:
        """The largest difference over the largest number, and the id of its row."""
        import torch

        found, expected = torch.cat(self.found)[:vocab_size], torch.cat(self.expected)[:vocab_size]
        difference = (found - expected).abs().nan_to_num(nan=torch.inf)
        return (difference.max() / expected.abs().max().clamp_min(1e-30)).item(), int(difference.argmax())


class Trace:
    """The outputs of one model's modules on disk, for the other's to be compared with.

    Args:
        folder: to write in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: list[str] = []
        self.differences: list[dict[str, Any]] = []

    def record(self, stations: Mapping[str, Any]) -> None:
        """Keep what each module gives from now on; outputs are [B, S, hidden]."""
        self.names = list(stations)
        for index, module in enumerate(stations.values()):

            def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
                np.save(self._path(index), _first(output)[:, :TRACE_POSITIONS].float().numpy())

            module.register_forward_hook(keep)

    def compare(self, stations: Mapping[str, Any]) -> None:
        """Compare what each module gives from now on with what was recorded; outputs are [S, B, hidden]."""
        import torch

        for index, (name, module) in enumerate(stations.items()):

            def note(_: Any, __: Any, output: Any, index: int = index, name: str = name) -> None:
                expected = _first(output).transpose(0, 1)[:, :TRACE_POSITIONS].float()
                found = torch.from_numpy(np.load(self._path(index)))
                difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
                self.differences.append(
                    {"hf": self.names[index], "megatron": name, "relative_difference": difference.item()}
                )

            module.register_forward_hook(note)

    def first_difference(self, tolerance: float) -> dict[str, Any] | None:
        """The first module, in the order in which they ran, whose outputs differ by more than `tolerance`."""
        return next((d for d in self.differences if not d["relative_difference"] <= tolerance), None)

    def _path(self, index: int) -> Path:
        return self._folder / f"station-{index:05d}.npy"


def _first(output: Any) -> torch.Tensor:
    values: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return values.detach()
