"""io_uring by raw system calls: one ring a channel, DEPTH entries, completions signalled through an event descriptor.

Source: linux/io_uring.h, io_uring(7). There are Python bindings; the maintained one is an alpha without aarch64 wheels and
wants Linux 6.14, so the forty lines that are needed stand here.

Not here: slots and fallbacks (`ring`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterable
from struct import Struct

from .. import syscalls
from ..errors import EngineError
from ..pool import WorkerPool
from .ring import DEPTH, RingChannel
from .threads import Options

# struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
# then io_sqring_offsets and io_cqring_offsets, each head, tail, ring_mask, ring_entries, …, resv1, user_addr
_PARAMS = Struct("<7I12x7I12x7I12x")
_SQE = Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data
_CQE = Struct("<QiI")  # user_data, res, flags
_OP_READV, _OP_WRITEV, _OP_READ, _OP_WRITE = 1, 2, 22, 23
_FEAT_SINGLE_MMAP, _FEAT_NODROP = 1 << 0, 1 << 1
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_REGISTER_EVENTFD = 4
_SETUP_CLAMP = 1 << 4


class UringChannel(RingChannel):
    """A channel on its own ring."""

    _ring = -1

    def __init__(self, disk: Options, pool: WorkerPool) -> None:
        params = ctypes.create_string_buffer(_PARAMS.size)
        _PARAMS.pack_into(params, 0, 0, 0, _SETUP_CLAMP, *([0] * 18))
        try:
            ring = syscalls.syscall(syscalls.number("io_uring_setup"), ctypes.c_uint(DEPTH), params)
        except OSError as e:
            hint = " (see kernel.io_uring_disabled and seccomp filters)" if e.errno == errno.EPERM else ""
            raise EngineError(f"aio=io_uring: this host gives no ring: {e.strerror}{hint}") from e
        try:
            self._map(ring, _PARAMS.unpack(params))
            super().__init__(disk, pool)
        except BaseException:
            os.close(ring)
            raise
        self._ring = ring
        self._enter_nr = syscalls.number("io_uring_enter")
        fd = ctypes.c_int(self.completion_fd)
        try:
            syscalls.syscall(syscalls.number("io_uring_register"), ring, _REGISTER_EVENTFD, ctypes.byref(fd), 1)
        except OSError as e:
            self.close()
            raise EngineError(f"aio=io_uring: no completion events on this host: {e.strerror}") from e

    def _map(self, ring: int, params: tuple[int, ...]) -> None:
        sq_entries, cq_entries, features = params[0], params[1], params[5]
        if not features & _FEAT_SINGLE_MMAP or not features & _FEAT_NODROP or sq_entries < DEPTH:
            raise EngineError("aio=io_uring: this kernel's rings are too old (Linux 5.5 is the first that will do)")
        sq_head, sq_tail, sq_mask, _, _, _, sq_array = params[7:14]
        cq_head, cq_tail, cq_mask, _, _, cqes, _ = params[14:21]
        size = max(sq_array + 4 * sq_entries, cqes + _CQE.size * cq_entries)
        try:
            self._ring_map = mmap.mmap(ring, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQ_RING)
            self._sqes = mmap.mmap(ring, sq_entries * _SQE.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQES)
        except OSError as e:
            raise EngineError(f"aio=io_uring: the ring cannot be mapped: {e.strerror} (see the locked memory limit)") from e
        # Indices are loaded and stored through this view: one 32-bit access each, never byte by byte.
        self._words = memoryview(self._ring_map).cast("I")
        self._sq_head, self._sq_tail, self._sq_mask = sq_head // 4, sq_tail // 4, self._words[sq_mask // 4]
        self._cq_head, self._cq_tail, self._cq_mask = cq_head // 4, cq_tail // 4, self._words[cq_mask // 4]
        self._cqes = cqes
        for i in range(sq_entries):
            self._words[sq_array // 4 + i] = i
        # Taking and dropping a lock orders the load of the tail before the loads of what it covers (aarch64 would not).
        self._order = threading.Lock()

    def _push(self, slots: list[int]) -> int:
        words, sqes, mask = self._words, self._sqes, self._sq_mask
        # The kernel looks at the queue inside io_uring_enter only: what it left the last time is simply written again.
        tail = words[self._sq_head]
        for slot in slots:
            request = self._slots[slot]
            assert request is not None
            opcode = _OP_WRITE if request.write else _OP_READ
            base, length = request.iovecs[0], request.iovecs[1]
            if request.count > 1 or length >= 1 << 31:
                opcode = _OP_WRITEV if request.write else _OP_READV
                base, length = request.iovecs.buffer_info()[0], request.count
            _SQE.pack_into(sqes, (tail & mask) * _SQE.size, opcode, 0, 0, self._fd, request.offset, base, length, 0, slot)
            tail = (tail + 1) & 0xFFFFFFFF
        words[self._sq_tail] = tail
        return syscalls.syscall(self._enter_nr, self._ring, ctypes.c_uint(len(slots)), 0, 0, None, 0)

    def _collect(self) -> Iterable[tuple[int, int]]:
        words, mask = self._words, self._cq_mask
        head, tail = words[self._cq_head], words[self._cq_tail]
        with self._order:
            pass
        found = []
        while head != tail:
            slot, result, _ = _CQE.unpack_from(self._ring_map, self._cqes + (head & mask) * _CQE.size)
            found.append((slot, result))
            head = (head + 1) & 0xFFFFFFFF
        words[self._cq_head] = head
        return found

    def close(self) -> None:
        super().close()
        ring, self._ring = self._ring, -1
        if ring >= 0:
            self._words.release()
            self._ring_map.close()
            self._sqes.close()
            os.close(ring)
