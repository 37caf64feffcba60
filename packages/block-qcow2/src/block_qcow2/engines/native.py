"""Linux AIO (io_submit(2) and friends). Truly asynchronous only with direct I/O: a buffered request blocks in io_submit.

Source: linux/aio_abi.h. Not here: slots and fallbacks (`ring`).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable
from struct import Struct

from .. import syscalls
from ..errors import EngineError
from ..pool import WorkerPool
from .ring import DEPTH, RingChannel
from .threads import Options

# struct iocb: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd
_IOCB = Struct("<QIIHhIQQqQII")
_EVENT = Struct("<QQqq")  # struct io_event: data, obj, res, res2
_PREAD, _PWRITE, _PREADV, _PWRITEV = 0, 1, 7, 8
_FLAG_RESFD = 1


class NativeChannel(RingChannel):
    """A channel on its own AIO context, which signals the channel's event descriptor."""

    _context = 0

    def __init__(self, disk: Options, pool: WorkerPool) -> None:
        context = ctypes.c_ulong(0)
        try:
            self._submit_nr = syscalls.number("io_submit")
            self._getevents_nr = syscalls.number("io_getevents")
            syscalls.syscall(syscalls.number("io_setup"), ctypes.c_uint(DEPTH), ctypes.byref(context))
        except OSError as e:
            raise EngineError(f"aio=native: this host gives no Linux AIO context: {e.strerror} (see fs.aio-max-nr)") from e
        try:
            super().__init__(disk, pool)
        except BaseException:
            syscalls.syscall(syscalls.number("io_destroy"), context)
            raise
        self._context = context.value
        self._iocbs = ctypes.create_string_buffer(DEPTH * _IOCB.size)
        self._iocbs_at = ctypes.addressof(self._iocbs)
        self._events = ctypes.create_string_buffer(DEPTH * _EVENT.size)

    def _push(self, slots: list[int]) -> int:
        pointers = array("Q")
        for slot in slots:
            request = self._slots[slot]
            assert request is not None
            opcode = _PWRITE if request.write else _PREAD
            base, length = request.iovecs[0], request.iovecs[1]
            if request.count > 1:
                opcode = _PWRITEV if request.write else _PREADV
                base, length = request.iovecs.buffer_info()[0], request.count
            at = slot * _IOCB.size
            _IOCB.pack_into(
                self._iocbs, at, slot, 0, 0, opcode, 0, self._fd, base, length, request.offset, 0, _FLAG_RESFD, self.completion_fd
            )
            pointers.append(self._iocbs_at + at)
        where = ctypes.c_void_p(pointers.buffer_info()[0])
        return syscalls.syscall(self._submit_nr, ctypes.c_ulong(self._context), ctypes.c_long(len(pointers)), where)

    def _collect(self) -> Iterable[tuple[int, int]]:
        if not self._in_kernel:
            return []
        context, none = ctypes.c_ulong(self._context), ctypes.c_long(0)
        count = syscalls.syscall(self._getevents_nr, context, none, ctypes.c_long(DEPTH), self._events, ctypes.byref(_NO_WAIT))
        size = _EVENT.size
        return [(data, result) for data, _, result, _ in _EVENT.iter_unpack(memoryview(self._events)[: count * size])]

    def close(self) -> None:
        super().close()
        context, self._context = self._context, 0
        if context:
            syscalls.syscall(syscalls.number("io_destroy"), ctypes.c_ulong(context))


_NO_WAIT = (ctypes.c_long * 2)(0, 0)  # struct timespec
