"""Which way a token stream runs: the only module that flips ids.

Two orders exist, and every array of ids is named after the one it is in:

    natural   reading order                    ids_nat   Once upon a time
    reversed  the reverse model's own order    ids_rev   time a upon Once

A *direction* is a fact about data and about weights. It is written into the
manifest of a dataset, the arguments of a checkpoint and the configuration of an
exported model, and read from there. Nothing here knows a tokenizer, a file format
or a framework: `flip` takes lists, numpy arrays and torch tensors alike. numpy is imported where arrays are made, so
that a tool can name the directions, and start what takes long, without waiting for it.

A document on disk, with `--append-eod` (E is the end-of-document id):

    natural text   Once upon a time
    forward file   Once upon a time E        E closes the document
    reverse file   time a upon Once E        E stands at the natural beginning

so that, in either file, a model that reads from left to right finds E after the
last token that belongs to a document, and learns to write E there: a forward model
that the text has ended, a reverse model that the text has begun.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ledom.errors import DirectionError

if TYPE_CHECKING:
    import numpy as np


class Direction(enum.StrEnum):
    """The order in which a model reads and writes tokens."""

    FORWARD = "forward"
    REVERSE = "reverse"

    @classmethod
    def parse(cls, value: str, *, where: str) -> Direction:
        """Read a direction that was written down in `where` (a file and field, for the message).

        Raises:
            DirectionError: for any other word.
        """
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(str(d)) for d in cls)
            raise DirectionError(f"{where} says direction {value!r}; known directions are {known}") from None


def flip[Ids](ids: Ids) -> Ids:
    """Reverse the last axis of `ids`: natural to reversed order and back (it is its own inverse).

    Args:
        ids: list or tuple [n], numpy array [..., n] or torch tensor [..., n].

    Returns:
        The same kind. Lists, tuples and tensors are copied; a numpy array comes back
        as a view with a negative stride.

    >>> flip([5, 6, 7])
    [7, 6, 5]
    """
    flip_axes = getattr(ids, "flip", None)  # torch tensors have no negative strides
    if flip_axes is not None:
        return flip_axes(-1)
    if isinstance(ids, (list, tuple)):
        return ids[::-1]  # type: ignore[return-value]
    return ids[..., ::-1]  # type: ignore[index]


def to_model_order[Ids](ids_nat: Ids, direction: Direction) -> Ids:
    """Put ids from natural order into the order in which a model of `direction` reads them."""
    return flip(ids_nat) if direction is Direction.REVERSE else ids_nat


def to_natural_order[Ids](ids_model: Ids, direction: Direction) -> Ids:
    """Put ids that a model of `direction` reads or has written into natural order."""
    return flip(ids_model) if direction is Direction.REVERSE else ids_model


def stored_document(ids_nat: np.ndarray, direction: Direction, eod_id: int | None) -> np.ndarray:
    """The ids of one document as they stand in a `.bin` file.

    Args:
        ids_nat: the ids of the document in natural order, without an end-of-document id; [n].
        direction: the direction of the file.
        eod_id: appended last if not None, in both directions.

    Returns:
        [n] or [n + 1], the dtype of `ids_nat`.

    >>> stored_document(np.array([5, 6, 7]), Direction.REVERSE, eod_id=0)
    array([7, 6, 5, 0])
    """
    import numpy as np

    ids = to_model_order(ids_nat, direction)
    return ids if eod_id is None else np.concatenate([ids, np.array([eod_id], dtype=ids.dtype)])


def natural_document(ids_stored: np.ndarray, direction: Direction, eod_id: int | None) -> np.ndarray:
    """The inverse of `stored_document`: one stored document in natural order, without its end-of-document id.

    Raises:
        DirectionError: `eod_id` is given and the document does not end with it.

    >>> natural_document(np.array([7, 6, 5, 0]), Direction.REVERSE, eod_id=0)
    array([5, 6, 7])
    """
    if eod_id is None:
        return to_natural_order(ids_stored, direction)
    if len(ids_stored) == 0 or ids_stored[-1] != eod_id:
        last = ids_stored[-1] if len(ids_stored) else "nothing"
        raise DirectionError(f"a stored document must end with the end-of-document id {eod_id}, found {last}")
    return to_natural_order(ids_stored[:-1], direction)


def flip_groups(ids: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Put the groups (sentences) of one document last to first; the ids inside a group stay in order.

    Args:
        ids: the ids of the document, group after group; [sum(group_sizes)].
        group_sizes: ids per group, in the order in which they stand in `ids`; [groups].

    Returns:
        A copy; with `flip(group_sizes)` the function undoes itself.

    >>> flip_groups(np.array([1, 2, 3, 8, 9]), np.array([3, 2]))
    array([8, 9, 1, 2, 3])
    """
    import numpy as np

    ends = np.cumsum(group_sizes)
    assert (int(ends[-1]) if len(ends) else 0) == len(ids), (group_sizes, len(ids))
    groups = [ids[end - size : end] for size, end in zip(group_sizes, ends, strict=True)]
    return np.concatenate(flip(groups)) if groups else ids.copy()


def stored_batch(documents_nat: Sequence[np.ndarray], direction: Direction, eod_id: int | None) -> np.ndarray:
    """Many documents as they stand one after the other in a `.bin` file: `stored_document` of each, joined.

    The documents are joined last to first, each behind its end-of-document id, and one flip of the
    whole then reverses every document and puts the documents back in order:

        joined     E d e   E a b c         documents a b c and d e
        flipped    c b a E   e d E

    Args:
        documents_nat: ids of each document in natural order; arrays [n] of one dtype.
        direction: the direction of the file.
        eod_id: closes each document if not None.

    Returns:
        All ids, in the dtype of the documents; an empty int32 array for no document.

    >>> stored_batch([np.array([1, 2, 3]), np.array([8, 9])], Direction.REVERSE, eod_id=0)
    array([3, 2, 1, 0, 9, 8, 0])
    """
    import numpy as np

    if not documents_nat:
        return np.empty(0, dtype=np.int32)
    parts: list[np.ndarray] = list(to_model_order(list(documents_nat), direction))
    if eod_id is not None:
        end = np.array([eod_id], dtype=documents_nat[0].dtype)
        is_first = direction is Direction.REVERSE
        closed = [end] * (2 * len(parts))
        closed[1 if is_first else 0 :: 2] = parts
        parts = closed
    return to_model_order(np.concatenate(parts), direction)


def turn_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a training sample of a reverse model from the model's order into natural order.

    Labels stay with their tokens: the label of a token is the one before it in the text.

        model's order    tokens  d c b    labels  c b a    positions  0 1 2
        natural order            b c d            a b c               2 1 0

    Args:
        sample: name to tensor or array, each [..., S].
    """
    return {name: flip(values) for name, values in sample.items()}


def turn_spans(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn the bounds of every token's document along with a sample: [S] each, indices into the sample.

    >>> turn_spans(np.array([0, 0, 0, 3]), np.array([2, 2, 2, 3]))
    (array([0, 1, 1, 1]), array([0, 3, 3, 3]))
    """
    end = len(first) - 1
    return end - flip(last), end - flip(first)


@dataclass(frozen=True)
class ConditionedIds:
    """What a model reads to score a target text given another text.

    Attributes:
        ids: the whole sequence in the model's order, starting with the boundary id.
        target_start: index in `ids` of the first target token; the target runs to the end,
            and its token at index t is predicted from the logits at index t - 1.
    """

    ids: list[int]
    target_start: int


def condition(
    target_nat: Sequence[int],
    given_nat: Sequence[int],
    direction: Direction,
    *,
    boundary_id: int,
    closed: bool = False,
) -> ConditionedIds:
    """Lay out log P(target given the other text) for a model of `direction`.

    For a forward model `given` precedes the target in natural order; for a reverse
    model it follows it. The boundary (end-of-document) id comes first, since in
    training every document follows the boundary of another one:

        natural order        x x x y y           x = target, y = given, reverse model
        model order      E   y y x x x           ids; target_start = 3
        scored               . . ^ ^ ^

        natural order        x x x y y           x = given, y = target, forward model
        model order      E   x x x y y           target_start = 4

    Args:
        target_nat: ids to be scored, natural order; [n] with n >= 1, or `closed`.
        given_nat: ids conditioned on, natural order; [m], may be empty.
        direction: the model's direction.
        boundary_id: the end-of-document id of the model's tokenizer.
        closed: also score the boundary after the target, i.e. that the document begins
            (reverse) or ends (forward) there.

    Raises:
        DirectionError: nothing would be scored.

    >>> condition([1, 2, 3], [8, 9], Direction.REVERSE, boundary_id=0).ids
    [0, 9, 8, 3, 2, 1]
    """
    given = [int(i) for i in to_model_order(list(given_nat), direction)]
    target = [int(i) for i in to_model_order(list(target_nat), direction)]
    if closed:
        target.append(boundary_id)
    if not target:
        raise DirectionError("the text to be scored has no token")
    return ConditionedIds(ids=[boundary_id, *given, *target], target_start=1 + len(given))


def pair_target(num_question: int, num_answer: int, direction: Direction, loss_on: str) -> tuple[int, int]:
    """The ids of a stored question and answer that a model learns to write, as a range.

    A pair is one document, the question before the answer in reading order, and closed by E, which belongs to
    the part that stands before it:

        reading order     q q q a a
        reverse file      a a q q q E       loss on the question: (2, 6), on the answer: (0, 2)
        forward file      q q q a a E       loss on the question: (0, 3), on the answer: (3, 6)

    Args:
        num_question: ids of the question's part.
        num_answer: ids of the answer's part.
        direction: of the file and of the model.
        loss_on: "question", "answer" or "both".

    Returns:
        First id, and one beyond the last, counted in the stored document with its end-of-document id.

    >>> pair_target(3, 2, Direction.REVERSE, "question")
    (2, 6)
    """
    first, end = (num_answer if direction is Direction.REVERSE else num_question), num_question + num_answer + 1
    is_last = loss_on == ("question" if direction is Direction.REVERSE else "answer")
    return (0, end) if loss_on == "both" else (first, end) if is_last else (0, first)


def check_same_direction(expected: Direction, found: Direction, *, expected_by: str, found_in: str) -> None:
    """Refuse to mix directions.

    Raises:
        DirectionError: they differ; the message names both facts and where they come from.
    """
    if expected is not found:
        raise DirectionError(
            f"{expected_by} is a {expected} model, but {found_in} is {found}. "
            f"Use {expected} data (tools/preprocess_data.py --direction {expected}), "
            f"or run in the other direction (--direction {found})."
        )


def describe_direction(direction: Direction) -> dict[str, Any]:
    """The record that is written beside weights: the direction, and in words how to use them."""
    if direction is Direction.REVERSE:
        usage = "tokenise text normally, reverse the list of ids, run the model; reverse generated ids before decoding"
    else:
        usage = "an ordinary causal language model"
    return {"direction": str(direction), "usage": usage}
