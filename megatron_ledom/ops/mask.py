"""The one mask of every attention path: row i attends the keys lo(i) .. hi(i), and neither end ever steps back.

    lo(i) = max(first(i), i - left)        first(i), last(i): the ends of the document that token i is in
    hi(i) = min(last(i),  i + right)       left, right: how far a row looks to either side

    row   causal        reversed      reversed,     reversed, documents
          keys 01234    keys 01234    window 2      0-2 and 3-4
     0         x....         xxxxx         xx...         xxx..
     1         xx...         .xxxx         .xx..         .xx..
     2         xxx..         ..xxx         ..xx.         ..x..
     3         xxxx.         ...xx         ...xx         ...xx
     4         xxxxx         ....x         ....x         ....x

`csrc/reversed_attention/mask.h` holds the same definition for the kernels; a test compares the two. Legend: B batch,
S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError


@dataclass(frozen=True)
class Documents:
    """The document of every token: int32 [B, S] each, the indices of its first and last token in the sequence.

    A token of no document (padding) has `first` = `last` + 1. Neither ever steps back along a sequence.
    """

    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a row attends.

    Attributes:
        left: how many keys before its own a row attends; None for all.
        right: how many after its own; None for all.
        documents: where attention stops; None: a sequence is one document.
    """

    left: int | None
    right: int | None
    documents: Documents | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            reach = getattr(self, name)
            if reach is not None and reach < 0:
                raise UsageError(f"attention mask: {name} is {reach}; it counts keys and must not be negative")

    def reach(self, seq: int) -> tuple[int, int]:
        """`left` and `right` as numbers, at most `seq`."""
        left, right = (seq if reach is None else min(reach, seq) for reach in (self.left, self.right))
        return left, right

    def is_plain(self, seq: int) -> bool:
        """Whether it is causal or reversed-causal over whole sequences: what torch can say without writing it out."""
        return self.documents is None and self.reach(seq) in ((seq, 0), (0, seq))


def model_order_mask(window: int | None = None, documents: Documents | None = None) -> AttentionMask:
    """Causal in the order of the data: row i attends keys j <= i.

    Args:
        window: keys that a row attends at most, its own included; None for all.
        documents: where attention stops.
    """
    return AttentionMask(left=_reach(window), right=0, documents=documents)


def natural_order_mask(
    direction: Direction, window: int | None = None, documents: Documents | None = None
) -> AttentionMask:
    """What a model of `direction` attends in natural order: a reverse model keys j >= i, its forward twin j <= i.

    Args:
        direction: the model's.
        window: keys that a row attends at most, its own included; None for all.
        documents: where attention stops.
    """
    if direction is Direction.FORWARD:
        return model_order_mask(window, documents)
    return AttentionMask(left=0, right=_reach(window), documents=documents)


def _reach(window: int | None) -> int | None:
    if window is not None and window < 1:
        raise UsageError(f"attention window {window}: a row attends at least its own key, give 1 or more")
    return None if window is None else window - 1


def check_documents(documents: Documents | None, batch: int, seq: int, device: torch.device, what: str) -> None:
    """Refuse document bounds that are not of a tensor [`batch`, `seq`, ...] on `device`; nothing to do for None.

    Args:
        documents: what a caller gave; the kernels read its memory as it stands.
        batch: B.
        seq: S.
        device: of the other tensors.
        what: the operation, for the message.

    Raises:
        UsageError: another shape, dtype or device.
    """
    for bounds in () if documents is None else (documents.first, documents.last):
        if bounds.shape != (batch, seq) or bounds.dtype != torch.int32:
            raise UsageError(
                f"{what}: document bounds are {bounds.dtype} {list(bounds.shape)}, not int32 [B, S] = [{batch}, {seq}]"
            )
        if bounds.device != device:
            raise UsageError(f"{what}: document bounds are on {bounds.device}, the other tensors on {device}")


def documents_from_lengths(cu_seqlens: torch.Tensor, batch: int, seq: int) -> Documents:
    """The documents of packed sequences.

    Args:
        cu_seqlens: where documents begin, and the end of the last one, counted over all `batch * seq` tokens;
            integers [documents + 1], not decreasing. Tokens outside are padding; a row of the batch ends a document.
        batch: rows.
        seq: tokens in each.

    Raises:
        UsageError: it decreases, or reaches outside the batch.
    """
    bounds = cu_seqlens.to(torch.int64)
    if bounds.ndim != 1 or len(bounds) < 2 or bool((bounds.diff() < 0).any()):
        raise UsageError(
            f"cu_seqlens must not decrease and holds at least two numbers, found {bounds.tolist()[:8]} ..."
        )
    if bounds[0] < 0 or bounds[-1] > batch * seq:
        raise UsageError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; the batch holds {batch} x {seq} tokens")
    tokens = torch.arange(batch * seq, device=bounds.device)
    document = torch.searchsorted(bounds, tokens, right=True)  # 0: before the first, len(bounds): after the last
    none, end = bounds.new_zeros(1), bounds.new_full((1,), batch * seq)
    begins, ends = torch.cat([none, bounds, end]), torch.cat([bounds, end])
    row = tokens // seq * seq
    first = torch.maximum(begins[document], row) - row
    last = torch.minimum(ends[document] - 1, row + seq - 1) - row
    is_padding = (document == 0) | (document == len(bounds))
    first = torch.where(is_padding, last + 1, first)
    shape = (batch, seq)
    return Documents(first.to(torch.int32).view(shape), last.to(torch.int32).view(shape))


def documents_from_ends(is_last_BS: torch.Tensor) -> Documents:
    """The documents of rows in which every document's last token is marked; the last token of a row always ends one.

    Args:
        is_last_BS: bool [B, S].
    """
    batch, seq = is_last_BS.shape
    ends = is_last_BS.clone()
    ends[:, -1] = True
    tokens = torch.arange(batch * seq, device=ends.device)
    cu_seqlens = torch.cat([tokens.new_zeros(1), tokens[ends.view(-1)] + 1])
    return documents_from_lengths(cu_seqlens, batch, seq)


def intervals(mask: AttentionMask, batch: int, seq: int, device: torch.device | str = "cpu") -> Documents:
    """The first and last key of every row, int32 [B, S] each; a row whose first is after its last attends nothing."""
    left, right = mask.reach(seq)
    row = torch.arange(seq, dtype=torch.int32, device=device).expand(batch, seq)
    if mask.documents is None:
        return Documents((row - left).clamp(min=0), (row + right).clamp(max=seq - 1))
    documents = mask.documents
    return Documents(torch.maximum(row - left, documents.first), torch.minimum(row + right, documents.last))


def dense_mask(mask: AttentionMask, batch: int, seq: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask written out: bool [B, S, S], True where row (second axis) attends key (third axis)."""
    rows = intervals(mask, batch, seq, device)
    key = torch.arange(seq, dtype=torch.int32, device=device)
    return (key >= rows.first[..., None]) & (key <= rows.last[..., None])
