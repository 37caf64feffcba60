"""What becomes of what a machine asks for: requests that cross a reset, vCPUs that fail, reboots from files that are gone."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pystratovirt.cmdline import parse
from pystratovirt.events import TERMINATING, EventChannel
from pystratovirt.runtime import Runtime
from pystratovirt.vm import VirtualMachine
from qmp_protocol.events import Reset, Shutdown, Stopped
from virtio_devices.vhost_user import session
from vmm_core import testprotocol
from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.kvm import vcpu
from vmm_core.machine.core import PAUSE_LIMIT, VmStatus

MiB = 1 << 20
ACPI_RESET, KEYBOARD_RESET = "writeb 0xf0000012 0x42\n", "outb 0x64 0xfe\n"
PLAIN_KERNEL = 0x100_0000  # where a kernel without a header goes


class Run:
    """A machine in test mode, and a main loop that takes a turn when the test says so."""

    def __init__(self, folder: Path, *options: str, machine: str = "microvm") -> None:
        self.told: list[Any] = []  # events, as clients get them
        self._events = EventChannel()
        words = ["-machine", machine, "-mod-test", str(folder / "unused"), "-m", "128", "-smp", "2", *options]
        self.vm = VirtualMachine(parse(words), self._events.post)
        self.machine = self.vm.machine
        self.vm.start()
        self.runtime = Runtime(self.vm, self._events)
        self.runtime._qmp.emit = self.told.append  # type: ignore[method-assign, assignment]
        self._protocol = testprotocol.TestProtocol(self.vm.test_access())

    def guest_does(self, lines: str) -> None:
        """Do what a guest does, in test mode's words, before the main loop has its turn."""
        assert set(self._protocol.receive(lines.encode()).split(b"\r\n")) == {b"OK", b""}

    def crash(self, cpu: int) -> None:
        self.machine.vcpu_exited(cpu, ExitReason.CRASH, "KVM_EXIT_UNKNOWN")

    def turn(self) -> None:
        """Let the main loop handle what has arrived."""
        for event in self._events.drain():
            self.runtime._handle(event)

    def close(self) -> None:
        self.vm.close()
        self._events.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()


class TestReboots:
    def test_two_ways_to_reset_that_a_guest_tries_in_a_row_are_one_reset(self, run: Run) -> None:
        run.guest_does(ACPI_RESET + KEYBOARD_RESET)
        run.turn()
        assert run.told == [Reset()]

    def test_the_triple_fault_that_a_guest_tries_last_does_not_end_the_machine_that_was_reset(self, run: Run) -> None:
        run.guest_does(ACPI_RESET)
        run.machine.vcpu_exited(0, ExitReason.SHUTDOWN, "KVM_EXIT_SHUTDOWN: triple fault")
        run.turn()
        assert run.told == [Reset()]
        assert run.machine.status is VmStatus.RUNNING

    def test_a_guest_that_reboots_twice_is_reset_twice(self, run: Run) -> None:
        for _ in range(2):
            run.guest_does(ACPI_RESET)
            run.turn()
        assert run.told == [Reset(), Reset()]

    def test_a_client_s_reset_takes_the_place_of_the_guest_s(self, run: Run) -> None:
        run.guest_does(ACPI_RESET)
        run.runtime.reset(guest=False, reason="host-qmp-system-reset")
        run.turn()
        assert run.told == [Reset()]

    def test_without_acpi_the_first_request_is_the_end(self, tmp_path: Path) -> None:
        run = Run(tmp_path, machine="microvm,acpi=off")
        run.guest_does(KEYBOARD_RESET * 2)
        run.turn()
        assert run.told == [Shutdown(guest=True, reason="guest-shutdown")]
        run.close()

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_guest_reboots_from_the_kernel_it_has_whatever_becomes_of_the_files_names(
        self, tmp_path: Path, replaced: bool
    ) -> None:
        content = {"kernel": b"\xfa\xf4Linux version 6.1.0 (a@b) (gcc 12) #1 SMP\n".ljust(MiB, b"k"), "initrd": b"i" * 5000}
        for name, data in content.items():
            (tmp_path / name).write_bytes(data)
        run = Run(tmp_path, "-kernel", str(tmp_path / "kernel"), "-initrd", str(tmp_path / "initrd"))
        for name in content:  # as a package's upgrade does: a new file takes the name of the old one, or none does
            if replaced:
                (tmp_path / "new").write_bytes(b"another version")
                (tmp_path / "new").rename(tmp_path / name)
            else:
                (tmp_path / name).unlink()
        memory = run.machine.memory
        initrd = 128 * MiB - 0x2000
        memory.write(PLAIN_KERNEL, bytes(MiB))
        memory.write(initrd, bytes(0x2000))
        run.guest_does(ACPI_RESET)
        run.turn()
        assert run.told == [Reset()]
        assert memory.read(PLAIN_KERNEL, MiB) == content["kernel"]
        assert memory.read(initrd, 5000) == content["initrd"]
        run.close()


class TestFailures:
    def test_vcpus_that_fail_together_stop_the_machine_once(self, run: Run) -> None:
        run.crash(0)
        run.crash(1)
        run.turn()
        run.crash(1)
        run.turn()
        assert run.told == [Stopped()]
        assert run.machine.status is VmStatus.FAILED

    def test_a_failure_that_arrives_after_a_pause_is_not_lost_and_no_second_stop(self, run: Run) -> None:
        run.crash(0)
        run.machine.pause()
        run.turn()
        assert run.told == []
        assert run.machine.status is VmStatus.FAILED

    def test_a_failure_from_before_a_reset_is_over(self, run: Run) -> None:
        run.crash(0)
        run.runtime.reset(guest=False, reason="host-qmp-system-reset")
        run.turn()
        assert run.told == [Reset()]
        assert run.machine.status is VmStatus.RUNNING


class Stuck:
    """A part that never does what it is told."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def refuse(self) -> None:
        raise self.error

    reset = pause = resume = stop = refuse


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), MemoryError()], ids=repr)
class TestParts:
    """Parts fail with what the host says, which the main loop must survive: nobody could end the process any more."""

    def test_a_machine_that_cannot_be_reset_ends(self, run: Run, error: Exception) -> None:
        run.machine.components["stuck"] = cast("Any", Stuck(error))
        run.guest_does(ACPI_RESET)
        run.turn()
        assert run.told == [Shutdown(guest=False, reason="reset-failed")]
        assert run.runtime.status == 1

    def test_a_machine_that_cannot_come_to_rest_fails_as_any_other(self, run: Run, error: Exception) -> None:
        run.machine.add_pausable(cast("Any", Stuck(error)))
        run.crash(0)
        run.turn()
        assert run.told == [Stopped()]
        assert run.machine.status is VmStatus.FAILED

    def test_a_machine_that_cannot_end_is_the_end_of_the_process(self, run: Run, error: Exception) -> None:
        vcpus = run.machine.vcpus
        vcpus.append(cast("Any", Stuck(error)))
        run.runtime.end(guest=False, reason="host-qmp-quit")
        assert run.told == [Shutdown(guest=False, reason="host-qmp-quit")]
        assert run.runtime.status == 1
        vcpus.pop()


def test_the_end_waits_for_a_vcpu_as_long_as_the_reset_of_a_device_may_hold_it() -> None:
    longest = session.SETTLE_LIMIT + 2 * session.REPLY_LIMIT  # its requests come back, its rings are stopped, it is reset
    assert 1.5 * longest <= vcpu._STOP_LIMIT, "quit would end with status 1 and give back what the vCPU still uses"
    assert vcpu._STOP_LIMIT <= PAUSE_LIMIT


def test_a_signal_that_interrupts_nothing_wakes_the_main_loop() -> None:
    """As when it comes just before the main thread waits: Python's handler runs only after the wait."""
    before = {number: signal.getsignal(number) for number in (*TERMINATING, signal.SIGPIPE)}
    channel = EventChannel()
    try:
        channel.catch_signals()

        def come() -> None:
            time.sleep(0.2)  # the main thread waits by then
            signal.raise_signal(signal.SIGTERM)  # this thread's, so that it interrupts no other

        thread = threading.Thread(target=come)
        thread.start()
        assert select.select([channel.fileno()], [], [], 10)[0], "nobody would have ended the process"
        thread.join()
        assert channel.drain() == [signal.SIGTERM]
        assert not select.select([channel.fileno()], [], [], 0)[0]
    finally:
        channel.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert signal.set_wakeup_fd(-1) == -1
