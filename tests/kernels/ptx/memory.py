"""The state spaces: global memory, the blocks' shared memory, parameters. Bounds, alignment, initialisation, races.

Shared memory is followed word by word (4 bytes): who wrote it and when, who read it and when, whether a copy is under
way to it, whether an asynchronous reader may see it. An access that is not ordered after what it depends on is an
error at once, in whatever order the threads happen to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.order import NEVER, UNWRITTEN, Array, Order

WORD = 4
PARAMS_BASE = 0x10_0000_0000
PARAM_STRIDE = 0x1_0000
GENERIC = 0x4000_0000_0000_0000
"""Added to the address of a parameter, it is its generic address."""


class FaultError(Exception):
    """What a thread did wrong; the machine adds where. `lane` is the first that did, if it is one thread's fault."""

    def __init__(self, what: str, lane: int | None = None) -> None:
        super().__init__(what)
        self.lane = lane


def check(is_right: Array, lanes: Array, what: str) -> None:
    """Raise for the first lane for which something is not right: [lanes] or [lanes, n]."""
    if not is_right.all():
        each = is_right.reshape(len(lanes), -1).all(axis=1)
        raise FaultError(what, int(lanes[np.argmin(each)]))


@dataclass
class Buffer:
    name: str
    start: int
    data: Array  # bytes
    is_writable: bool


class GlobalMemory:
    """Buffers of the host at their own addresses. What lies between them is nobody's."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, name: str, address: int, data: Array, is_writable: bool) -> None:
        self.buffers.append(Buffer(name, address, data, is_writable))

    def load(self, lanes: Array, addresses: Array, dtype: np.dtype, count: int) -> Array:
        """[lanes, count] numbers that lie one after another from each address on."""
        found = np.empty((len(lanes), count), dtype)
        for buffer, chosen, first in self._find(lanes, addresses, dtype.itemsize, count):
            found[chosen] = buffer.data.view(dtype)[first[:, None] + np.arange(count)]
        return found

    def store(self, lanes: Array, addresses: Array, values: Array) -> None:
        """`values` is [lanes, count]."""
        count = values.shape[1]
        for buffer, chosen, first in self._find(lanes, addresses, values.itemsize, count):
            if not buffer.is_writable:
                raise FaultError(f"a store to {buffer.name}, which is only read", int(lanes[np.argmax(chosen)]))
            buffer.data.view(values.dtype)[first[:, None] + np.arange(count)] = values[chosen]

    def check_access(self, lanes: Array, addresses: Array, width: int) -> None:
        self._find(lanes, addresses, width, 1)

    def _find(self, lanes: Array, addresses: Array, width: int, count: int) -> list[tuple[Buffer, Array, Array]]:
        """Buffers, which of the lanes mean them, and the index of these lanes' first number."""
        size = width * count
        addresses = addresses.astype(np.int64)
        aligned = addresses % size == 0
        if not aligned.all():
            bad = int(np.argmin(aligned))
            raise FaultError(f"global address {addresses[bad]:#x} is not a multiple of {size}", int(lanes[bad]))
        missing = np.ones(len(lanes), bool)
        found = []
        for buffer in self.buffers:
            inside = (addresses >= buffer.start) & (addresses + size <= buffer.start + len(buffer.data))
            if inside.any():
                found.append((buffer, inside, (addresses[inside] - buffer.start) // width))
                missing &= ~inside
        if missing.any():
            bad = int(np.argmax(missing))
            what = f"{size} bytes at global address {addresses[bad]:#x} lie in no buffer"
            raise FaultError(what + self._near(addresses[bad]), int(lanes[bad]))
        return found

    def _near(self, address: int) -> str:
        before = [b for b in self.buffers if b.start <= address]
        if not before:
            return ""
        last = max(before, key=lambda b: b.start)
        return f": {address - last.start - len(last.data)} bytes after the end of {last.name}"


class ParamMemory:
    """The kernel's parameters, the same for all threads."""

    def __init__(self, params: list[tuple[str, bytes]]) -> None:
        self.params = params
        self.addresses = {name: PARAMS_BASE + i * PARAM_STRIDE for i, (name, _) in enumerate(params)}

    def load(self, lanes: Array, addresses: Array, dtype: np.dtype, count: int) -> Array:
        found = np.empty((len(lanes), count), dtype)
        for address in np.unique(addresses):
            index, offset = divmod(int(address) - PARAMS_BASE, PARAM_STRIDE)
            chosen = addresses == address
            size = dtype.itemsize * count
            if not 0 <= index < len(self.params) or offset + size > len(self.params[index][1]) or offset % size:
                raise FaultError(f"{size} bytes at offset {offset} of parameter {index} are not there, or not aligned",
                                 int(lanes[np.argmax(chosen)]))  # fmt: skip
            found[chosen] = np.frombuffer(self.params[index][1], dtype, count, offset)
        return found


class SharedMemory:
    """The shared memory of all blocks, one after another."""

    def __init__(self, size: int, num_blocks: int, order: Order, lane_blocks: Array) -> None:
        self.size = size
        self.order = order
        self.stride = -(-size // 1024) * 1024 // WORD  # words from block to block
        self.first_word = lane_blocks * self.stride  # of each lane's block
        self.lane_blocks = lane_blocks
        num_words = max(1, self.stride * num_blocks)
        self.data = np.full(num_words, 0xFFFFFFFF, np.uint32)  # NaN, as bf16 and as fp32
        self.writer = np.zeros(num_words, np.int16)  # the column of Order that wrote last
        self.written = np.full(num_words, UNWRITTEN)  # at which step; NEVER while a copy is under way
        self.read = np.full((num_words, order.num_warps), UNWRITTEN)  # at which step, by each warp
        self.being_read = np.zeros(num_words, np.int16)  # by how many asynchronous operations
        self.copier = np.zeros(num_words, np.int16)  # the column of the thread whose copy read last
        self.copied = np.full(num_words, UNWRITTEN)  # and when it knew of that
        self.has_asynchronous_readers = False
        self.visible = np.full(num_words, UNWRITTEN)  # to asynchronous readers who know the writer up to this step

    def words(self, lanes: Array, addresses: Array, size: int) -> Array:
        """[lanes, size / 4] places of the words from each address on, after checking that they are there."""
        addresses = addresses.astype(np.int64)
        if size < WORD:
            raise FaultError(f"accesses of {size} bytes to shared memory are not followed here")
        right = addresses % size == 0
        if not right.all():
            bad = int(np.argmin(right))
            raise FaultError(f"shared address {addresses[bad]} is not a multiple of {size}", int(lanes[bad]))
        right = (addresses >= 0) & (addresses + size <= self.size)
        if not right.all():
            bad = int(np.argmin(right))
            raise FaultError(f"{size} bytes at shared address {addresses[bad]} lie outside the block's {self.size}",
                             int(lanes[bad]))  # fmt: skip
        return (self.first_word[lanes] + addresses // WORD)[:, None] + np.arange(size // WORD)

    def load(self, lanes: Array, words: Array, step: int) -> Array:
        self.check_written(lanes, words)
        self.read[words, self.order.own[lanes, None] // 32] = step
        return self.data[words]

    def store(self, lanes: Array, words: Array, values: Array, step: int) -> None:
        self.check_free(lanes, words)
        self.complete(words, values, self.order.own[lanes, None], step)
        self.visible[words] = NEVER
        same = self.writer[words] == self.order.own[lanes, None]
        check(same, lanes, "another thread stores to the same word at the same time")

    def complete(self, words: Array, values: Array, writer: Array | int, step: int) -> None:
        """The data of a store or of a copy are there."""
        self.data[words] = values
        self.writer[words] = writer
        self.written[words] = step

    def begin_copy(self, lanes: Array, words: Array) -> None:
        """A copy to these words is under way, from now until `complete`; or they become a barrier, for ever."""
        self.check_free(lanes, words)
        self.data[words] = 0xFFFFFFFF
        self.writer[words] = self.order.own[lanes, None]
        self.written[words] = self.visible[words] = NEVER

    def check_written(self, lanes: Array, words: Array) -> None:
        """May these lanes read these words?"""
        written = self.written[words]
        if (written < 0).any():
            check(written >= 0, lanes, "reads shared memory that nobody has written")
        known = self.order.known[lanes[:, None], self.writer[words]]
        if not (known >= written).all():
            check(written != NEVER, lanes, "reads shared memory to which a copy is under way, or a barrier")
            check(known >= written, lanes, self._race("reads what", lanes, words, known < written, "wrote"))

    def check_free(self, lanes: Array, words: Array) -> None:
        """May these lanes write these words?"""
        written = self.written[words]
        known = self.order.known[lanes[:, None], self.writer[words]]
        if not (known >= written).all():
            check(written != NEVER, lanes, "writes shared memory to which a copy is under way, or a barrier")
            check(known >= written, lanes, self._race("overwrites what", lanes, words, known < written, "wrote"))
        if self.has_asynchronous_readers:
            check(self.being_read[words] == 0, lanes, "writes shared memory that is being read asynchronously")
            known = self.order.known[lanes[:, None], self.copier[words]] >= self.copied[words]
            check(known, lanes, "overwrites what a copy may still be reading")
        known = self.order.known_of_readers[lanes][:, None, :] >= self.read[words]
        if not known.all():
            check(known.all(axis=2), lanes, "overwrites what others may still be reading, without a barrier between")

    # ---- readers that are not threads: products of a warpgroup, copies to global memory

    def begin_reading(self, lane: int, words: Array) -> Array:
        """An operation that a thread has started reads these words, [n], until `end_reading`. Gives what they hold."""
        lanes, places = np.array([lane]), words.reshape(1, -1)
        self.check_written(lanes, places)
        visible = self.order.known[lane, self.writer[words]] >= self.visible[words]
        check(visible.reshape(1, -1), lanes, "asynchronous reader of what a store wrote, without a proxy fence between")
        self.has_asynchronous_readers = True
        self.being_read[words] += 1
        return self.data[words]

    def end_reading(self, words: Array) -> None:
        self.being_read[words] -= 1

    def note_read_by_warp(self, lane: int, words: Array, step: int) -> None:
        """An operation of the thread's warp has read these words, and all of the warp know that it has."""
        self.read[words, self.order.own[lane] // 32] = step

    def note_read(self, lane: int, words: Array, step: int) -> None:
        """An operation of the thread has read these words, and the thread knows that it has."""
        self.copier[words], self.copied[words] = self.order.own[lane], step

    def publish(self, lanes: Array, step: int) -> None:
        """What these threads of one block have stored may from now on be read by asynchronous readers."""
        begin = int(self.first_word[lanes[0]])
        part = slice(begin, begin + self.stride)
        is_theirs = np.zeros(self.order.threads + self.order.num_agents, bool)
        is_theirs[self.order.own[lanes]] = True
        hidden = (self.visible[part] == NEVER) & (self.written[part] != NEVER) & is_theirs[self.writer[part]]
        self.visible[part][hidden] = step

    def _race(self, what: str, lanes: Array, words: Array, bad: Array, did: str) -> str:
        lane, word = np.argwhere(bad)[0]
        writer = self.writer[words[lane, word]]
        who = f"thread {writer}" if writer < self.order.threads else "a copy"
        return f"{what} {who} {did}, without a barrier between"
