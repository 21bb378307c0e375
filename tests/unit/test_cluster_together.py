"""The ranks of a preflight over a real store: a rank that is stopped is named, one that waits is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.synchronize import Event

import pytest

from megatron_ledom.cluster import together
from megatron_ledom.cluster.together import Place, Team


def live(rank: int, ready: Event) -> None:
    """A rank that has started and waits for the others."""
    team = Team(Place(rank, 3, 0, f"node{rank}"), 300)
    team.watch(lambda findings: 0)
    team.reach("exchange")
    ready.set()
    time.sleep(300)


def test_a_stopped_rank_falls_silent_and_a_waiting_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(together, "SILENT_S", 5.0)
    context = multiprocessing.get_context("fork")  # the children have torch already
    team = Team(Place(0, 3, 0, "node0"), 300)
    ready = [context.Event(), context.Event()]
    ranks = [context.Process(target=live, args=(rank, ready[rank - 1]), daemon=True) for rank in (1, 2)]
    try:
        for rank, event in zip(ranks, ready, strict=True):
            rank.start()
            assert event.wait(120)
        team.reach("exchange")
        team._sign()
        time.sleep(2 * together.BEAT_S)
        waiting = team.behind()
        assert [(f.node, "all ranks are stuck in 'exchange'" in f.text) for f in waiting] == [(None, True)]

        os.kill(ranks[1].pid or 0, signal.SIGSTOP)
        (silent,) = team.behind()
        assert silent.node == "node2"
        assert silent.text == "rank 2 gives no sign of life since 'exchange'"

        ranks[0].kill()  # as a rank that has finished: rank 0 alone looks at the run, and may be late with it
        ranks[0].join()
        team.reach("end")
        (late,) = team.behind()
        assert late.node is None and late.text.startswith("rank 0 on node0 has not finished its look at the run")
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
