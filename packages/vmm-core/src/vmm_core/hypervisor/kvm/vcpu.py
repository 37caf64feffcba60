"""One vCPU and its thread: into the guest, out of it, and the accesses in between.

How a vCPU is got out of the guest: the kick signal is blocked in its thread and unblocked by KVM only while KVM_RUN lasts. It
ends KVM_RUN if it is under way, and the next one if it is not; no signal handler runs, no kick is lost. KVM completes the port
or memory access of the last exit before it looks for signals, so a vCPU that has stopped has nothing half done.

Not here: registers (`x86_64.vcpu`), what an exit that ends the guest means (`exits`, the machine).
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from errno import EAGAIN, EINTR
from fcntl import ioctl
from struct import Struct
from threading import Condition, Thread, get_ident, get_native_id
from typing import TYPE_CHECKING, Any

from vmm_core.bus import Bus
from vmm_core.errors import HypervisorError, LifecycleError
from vmm_core.hypervisor import ExitReason, VcpuListener
from vmm_core.hypervisor.kvm import ioctl as kvm
from vmm_core.hypervisor.kvm.ring import CoalescedRing
from vmm_core.hypervisor.kvm.split import read_bytes, write_bytes

if TYPE_CHECKING:
    from vmm_core.hypervisor.kvm.x86_64 import VcpuArch
    from vmm_core.state import State

KICK = signal.SIGRTMIN

# Blocked in vCPU threads like everything else would leave a crash of ours without its report.
_OUR_OWN_FAULT = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}

# A vCPU leaves the guest in microseconds. Its last exit may be the reset of a device that another process serves, which is given
# three steps of 5 s; as long as a pause waits for one (`machine.core.PAUSE_LIMIT`).
_STOP_LIMIT = 30.0  # seconds

_MOST_PIECES = 4096  # a page of string I/O, byte by byte

_VALUE = {1: Struct("<B"), 2: Struct("<H"), 4: Struct("<I"), 8: Struct("<Q")}
_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class KvmVcpu:
    """A vCPU (vmm_core.hypervisor.Vcpu). Made paused; its thread runs the guest whenever nothing keeps it from that.

    `_condition` guards the fields below it. It is held for a few instructions at a time, never during an exit.
    """

    def __init__(
        self,
        fd: int,
        index: int,
        mapping_size: int,
        buses: tuple[Bus, Bus],
        listener: VcpuListener,
        arch: VcpuArch,
        ring: Callable[[], CoalescedRing | None],
    ) -> None:
        """Take over the vCPU descriptor `fd`.

        `mapping_size` is that of its kvm_run, `buses` are those of ports and of memory, and `ring` is asked at start for the
        ring of collected writes, if there is one.
        """
        self.index = index
        self._fd = fd
        self._pio, self._mmio = buses
        self._listener, self._arch, self._get_ring = listener, arch, ring
        self._ring: CoalescedRing | None = None
        self._thread: Thread | None = None
        try:
            self._mapping = mmap.mmap(fd, mapping_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise HypervisorError(f"CPU {index}: cannot map kvm_run: {error.strerror}") from None
        self._run = memoryview(self._mapping)

        self._condition = Condition()
        self._wanted = False  # in the guest
        self._parked = True  # out of the guest, and staying there until `_wanted`
        self._dead = False  # the guest cannot go on from here: only other registers will help
        self._stopping = False
        self._alive = False  # the thread exists, and may be signalled
        self._failure: str | None = None  # why the thread could not be set up

    @property
    def fd(self) -> int:
        """The vCPU descriptor; -1 after stop()."""
        return self._fd

    @property
    def parked(self) -> bool:
        """Whether the vCPU is out of the guest and stays there."""
        return self._parked

    @property
    def thread_id(self) -> int:
        """Kernel thread id; 0 before start()."""
        return (self._thread.native_id or 0) if self._thread else 0

    # Life cycle, from any thread

    def start(self) -> None:
        """Load the boot state and start the thread, paused. Raises HypervisorError when that fails."""
        if self._thread is not None:
            raise LifecycleError(f"CPU {self.index} was started already")
        self._ring = self._get_ring()
        self._arch.load_boot()
        # Daemonic: a process that ends by an error must not wait for a guest.
        thread = Thread(target=self._main, name=f"CPU {self.index}/Kvm", daemon=True)
        with self._condition:
            try:
                thread.start()
            except RuntimeError as error:  # the system's limit of threads
                raise HypervisorError(f"CPU {self.index}: {error}") from None
            self._thread = thread
            self._condition.wait_for(lambda: self._alive or self._failure is not None)
        if self._failure is not None:
            raise HypervisorError(f"CPU {self.index}: {self._failure}")

    def request_pause(self) -> None:
        """Ask the vCPU to leave the guest, and return at once."""
        with self._condition:
            if self._wanted:
                self._wanted = False
                self._kick()

    def wait_paused(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the vCPU is out of the guest with nothing pending; False when it is not."""
        if self._thread is not None and get_ident() == self._thread.ident:
            raise LifecycleError(f"CPU {self.index} cannot wait for itself")
        with self._condition:
            return self._condition.wait_for(lambda: self._parked, timeout)

    def resume(self) -> None:
        """Let the vCPU into the guest. One that cannot go on stays out until reset() or restore()."""
        with self._condition:
            self._wanted = True
            self._condition.notify_all()

    def stop(self) -> None:
        """End the thread and give the vCPU back. Raises HypervisorError when a device keeps the thread from ending."""
        thread = self._thread
        if thread is not None:
            if get_ident() == thread.ident:
                raise LifecycleError(f"CPU {self.index} cannot stop itself")
            with self._condition:
                self._stopping = True
                self._condition.notify_all()
                self._kick()
            thread.join(_STOP_LIMIT)
            if thread.is_alive():
                raise HypervisorError(f"CPU {self.index} did not stop within {_STOP_LIMIT:.0f} s")
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._run.release()
            self._mapping.close()
            os.close(fd)

    # State, from any thread, while paused

    def reset(self) -> None:
        """Load the boot state again."""
        self._change_state(self._arch.load_boot)

    def save(self) -> State:
        """Return every register."""
        self._expect_parked()
        return self._arch.save()

    def restore(self, state: Any) -> None:
        """Put back what save() returned. Raises StateError for a state that is not one, or does not fit this host."""
        self._change_state(lambda: self._arch.restore(state))

    def describe(self) -> str:
        """Return the registers for a log."""
        self._expect_parked()
        return self._arch.describe()

    def _change_state(self, change: Any) -> None:
        self._expect_parked()
        change()
        with self._condition:
            self._dead = False
            self._condition.notify_all()

    def _expect_parked(self) -> None:
        if not self._parked:
            raise LifecycleError(f"CPU {self.index} is in the guest")

    def _kick(self) -> None:
        # With the condition held. A thread that has ended must not be signalled: its id may be gone or another's.
        if self._alive and not self._parked and self._thread is not None and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, KICK)

    # The thread

    def _main(self) -> None:
        try:
            self._set_up_thread()
        except Exception as error:  # whatever it is, start() waits to hear of it
            with self._condition:
                self._failure = str(error)
                self._condition.notify_all()
            return
        with self._condition:
            self._alive = True
            self._condition.notify_all()
        try:
            while self._wait_for_work():
                self._execute()
        finally:
            with self._condition:
                self._alive, self._parked = False, True
                self._condition.notify_all()

    def _set_up_thread(self) -> None:
        self._name_thread()
        signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.valid_signals()) - _OUR_OWN_FAULT)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        # Two signals below SIGRTMIN are the C library's own and stay open: setuid() in any thread waits for all others.
        mask = sum(1 << number - 1 for number in blocked if number != KICK)
        kvm.call(self._fd, kvm.SET_SIGNAL_MASK, bytearray(kvm.SIGNAL_MASK.pack(8, mask)))

    def _name_thread(self) -> None:
        try:
            fd = os.open(f"/proc/self/task/{get_native_id()}/comm", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:  # a name that cannot be given is no reason to fail
            return
        try:
            os.write(fd, f"CPU {self.index}/Kvm".encode())
        finally:
            os.close(fd)

    def _wait_for_work(self) -> bool:
        """Stay parked until the guest may run; False when the thread is to end."""
        with self._condition:
            self._parked = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._stopping or (self._wanted and not self._dead))
            self._parked = self._stopping
            return not self._stopping

    def _execute(self) -> None:
        """Run the guest until the vCPU is to pause, or cannot go on."""
        try:
            reason = self._run_guest()
            if reason is None:
                return
            meaning, words = self._explain(reason)
        except _CannotRun as error:
            meaning, words = ExitReason.CRASH, str(error)
        except Exception:
            # A device of ours that raised. The guest gets no answer, so it cannot go on; its owner gets the whole story.
            import traceback

            meaning, words = ExitReason.CRASH, f"error in a device:\n{traceback.format_exc()}"
            self._finish_access()
        self._dead = True
        self._listener.vcpu_exited(self.index, meaning, f"{words}\n{self._registers()}")

    def _run_guest(self) -> int | None:
        """Run the guest and serve its port and memory accesses.

        Returns None when the vCPU is to pause or stop, otherwise the exit reason that nothing here can serve. Raises
        _CannotRun when KVM_RUN fails.
        """
        fd, run_number, run = self._fd, kvm.RUN.number, self._run
        pio_read, pio_write, mmio_read, mmio_write = self._pio.read, self._pio.write, self._mmio.read, self._mmio.write
        unpack_io, unpack_mmio = kvm.EXIT_IO_DATA.unpack_from, kvm.EXIT_MMIO_DATA.unpack_from
        values, masks = _VALUE, _MASK
        exit_io, exit_mmio, out, at_exit = kvm.EXIT_IO, kvm.EXIT_MMIO, kvm.EXIT_IO_OUT, kvm.RUN_EXIT
        pack_mmio = _VALUE[8].pack_into
        ring = self._ring
        ends: Any = ring.ends if ring is not None else None
        with run[kvm.RUN_EXIT_REASON : kvm.RUN_EXIT_REASON + 4].cast("I") as exit_reason:
            while True:
                try:
                    ioctl(fd, run_number, 0)
                except OSError as error:
                    if error.errno == EINTR:
                        _take_kicks()
                        # A write collected before the pause belongs before it.
                        if ring is not None:
                            ring.flush()
                        if self._wanted and not self._stopping:
                            continue
                        return None
                    if error.errno == EAGAIN:  # another vCPU has just woken this one up
                        continue
                    raise _CannotRun(kvm.RUN.name, error.errno or 0) from None
                if ring is not None and ends[0] != ends[1]:
                    ring.flush()
                reason = exit_reason[0]
                if reason == exit_io:
                    direction, size, port, count, at = unpack_io(run, at_exit)
                    if size == count == 1:
                        if direction == out:
                            pio_write(port, 1, run[at])
                        else:
                            run[at] = pio_read(port, 1)
                        continue
                    value = values[size]
                    # REP INS and OUTS come as one exit with many elements.
                    if direction == out:
                        for element in range(at, at + count * size, size):
                            pio_write(port, size, value.unpack_from(run, element)[0])
                    else:
                        for element in range(at, at + count * size, size):
                            value.pack_into(run, element, pio_read(port, size))
                elif reason == exit_mmio:
                    address, data, length, is_write = unpack_mmio(run, at_exit)
                    mask = masks.get(length)
                    if mask is None:
                        if is_write:
                            write_bytes(self._mmio, address, length, data)
                        else:
                            pack_mmio(run, kvm.EXIT_MMIO_VALUE, read_bytes(self._mmio, address, length))
                    elif is_write:
                        mmio_write(address, length, data & mask)
                    else:
                        pack_mmio(run, kvm.EXIT_MMIO_VALUE, mmio_read(address, length))
                elif reason != kvm.EXIT_INTR:
                    return int(reason)

    def _finish_access(self) -> None:
        """Have KVM complete the access of the last exit without entering the guest.

        Otherwise it would do so after a reset, and skip an instruction of the next kernel.
        """
        self._run[kvm.RUN_IMMEDIATE_EXIT] = 1
        try:
            for _ in range(_MOST_PIECES):  # one access may have several exits
                ioctl(self._fd, kvm.RUN.number, 0)
        except OSError:
            _take_kicks()  # EINTR: nothing is left to complete
        finally:
            self._run[kvm.RUN_IMMEDIATE_EXIT] = 0

    def _explain(self, reason: int) -> tuple[ExitReason, str]:
        from vmm_core.hypervisor.kvm.exits import explain

        return explain(reason, self._run)

    def _registers(self) -> str:
        try:
            return self._arch.describe()
        except HypervisorError as error:
            return f"registers cannot be read: {error}"


class _CannotRun(kvm.KvmError):
    """KVM_RUN failed, as opposed to an error of the same kind in a device."""


def _take_kicks() -> None:
    """Take every kick that has arrived: they have done their work, and would end each KVM_RUN from here on."""
    while signal.sigtimedwait((KICK,), 0) is not None:
        pass
