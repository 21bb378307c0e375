"""Who hangs, by the signs of all ranks; a real stopped rank is in tests/distributed/test_hang.py."""

from __future__ import annotations

import queue
import sys
import threading

import torch

from megatron_ledom.train.hang_watch import Sign, find_hang, where_is


def sign(seen_s: float, moved_s: float, *, collective: str = "", step: int = 12) -> Sign:
    place = "megatron.core.optimizer.clip_grads.get_grad_norm_fp32:117" if collective else "megatron_ledom.x.f:3"
    return Sign(1, 1, step, collective, place, seen_s, moved_s)


def test_a_silent_rank_is_named_with_what_waits_for_it() -> None:
    signs = [sign(99, 80, collective="all_reduce"), sign(60, 60, step=11), sign(99, 80, collective="all_reduce")]
    found = find_hang(signs, 30, 100)
    assert found is not None
    assert found.startswith(
        "rank 1 has not answered for 40 s, step 12 (its last sign came from step 11, megatron_ledom.x"
    )
    assert found.endswith(
        "each of ranks 0, 2 waits in all_reduce (megatron.core.optimizer.clip_grads.get_grad_norm_fp32:117)"
    )
    assert find_hang(signs, 45, 100) is None


def test_a_rank_that_answers_but_holds_up_the_others_is_named() -> None:
    signs = [sign(99, 40, collective="broadcast"), sign(99, 50), sign(99, 40, collective="broadcast")]
    found = find_hang(signs, 30, 100)
    assert found is not None and found.startswith("rank 1 has been in megatron_ledom.x.f:3 for 50 s, step 12; ")
    assert find_hang([*signs[:2], sign(99, 90, collective="broadcast")], 30, 100) is None, "one has moved"


def test_without_a_collective_ranks_are_told_apart_by_where_they_are() -> None:
    """On NCCL a host waits for the device in `.item()`: no collective has a name there."""
    signs = [sign(99, 40) for _ in range(8)]
    signs[5].place = "megatron_ledom.train.pretrain.next_batch:241"
    found = find_hang(signs, 30, 100)
    assert found == (
        "rank 5 has been in megatron_ledom.train.pretrain.next_batch:241 for 60 s, step 12; "
        "each of ranks 0, 1, 2, 3, 4, 6, 7 is in megatron_ledom.x.f:3"
    )
    signs[2].collective = "broadcast"
    found = find_hang(signs, 30, 100)
    assert found is not None and found.startswith("rank 2 has been in broadcast (megatron_ledom.x.f:3) for 60 s")
    assert "rank 5 is in megatron_ledom.train.pretrain.next_batch:241; each of ranks 0, 1, 3," in found


def test_long_work_in_the_same_place_is_no_hang_before_its_time() -> None:
    assert find_hang([sign(99, 71), sign(99, 1)], 30, 100) is None, "one has moved within the timeout"
    found = find_hang([sign(99, 1), sign(99, 1)], 30, 100)
    assert found == "all ranks have been in megatron_ledom.x.f:3 for 99 s, step 12"
    assert find_hang([sign(99, 1, step=0), sign(99, 1, step=0)], 30, 100) is None, "a long load before the first step"


def test_all_in_one_collective_is_said_so() -> None:
    found = find_hang([sign(99, 1, collective="barrier")] * 2, 30, 100)
    assert found is not None and found.startswith("all ranks wait in barrier (")


def test_only_a_new_beat_is_a_sign() -> None:
    known = Sign()
    known.update({"beat": 1, "ticks": 5, "step": 3, "collective": "", "place": "a"}, 10.0)
    known.update({"beat": 1, "ticks": 5, "step": 3, "collective": "", "place": "a"}, 20.0)
    assert (known.seen_s, known.moved_s) == (10.0, 10.0)
    known.update({"beat": 2, "ticks": 5, "step": 3, "collective": "", "place": "a"}, 30.0)
    assert (known.seen_s, known.moved_s) == (30.0, 10.0)
    known.update({"beat": 3, "ticks": 6, "step": 3, "collective": "", "place": "a"}, 40.0)
    assert (known.seen_s, known.moved_s) == (40.0, 40.0)


def test_a_stack_shows_the_collective_and_who_called_it() -> None:
    """A thread waits in a real collective of a group of one, for a rank that never comes."""
    frames: queue.Queue[int] = queue.Queue()
    store = torch.distributed.HashStore()

    def wait() -> None:
        code = "def step(store, group):\n    torch.distributed.distributed_c10d._store_based_barrier(*store)\n"
        scope = {"torch": torch, "__name__": "megatron.core.something"}
        exec(code, scope)
        frames.put(threading.get_ident())
        import contextlib
        import datetime

        with contextlib.suppress(Exception):
            scope["step"]((0, store, "x", 2, datetime.timedelta(seconds=3)), None)

    thread = threading.Thread(target=wait)
    thread.start()
    ident, found = frames.get(), ("", "")
    while thread.is_alive() and not found[0]:
        found = where_is(sys._current_frames().get(ident))
    thread.join()
    assert found == ("store_based_barrier", "megatron.core.something.step:2")
    assert where_is(None) == ("", "outside of Megatron")
