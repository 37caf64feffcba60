"""vCPUs on a KVM that runs guests natively: what an emulating KVM cannot show."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "vmm-core" / "tests"))

from kvm_guest import LOOP, PATIENCE, PORT, Guest, flat_mode, kvm_trouble, real_mode
from vmm_core.hypervisor import ExitReason

pytestmark = pytest.mark.lab

OUT_EAX = bytes((0xE7, PORT))
COUNT = b"\x89\xd8" + OUT_EAX + b"\x43\xeb\xf9"  # mov eax, ebx; out PORT, eax; inc ebx; jmp
INIT = b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\x0c\x00"  # the local APIC's command register: all but self
SIPI = b"\xc7\x05\x00\x03\xe0\xfe\x02\x46\x0c\x00"  # the same, to start at 0x2000


@pytest.fixture
def guest() -> Iterator[Callable[..., Guest]]:
    assert not kvm_trouble()  # the lab without KVM is a broken lab, not a reason to skip
    guests: list[Guest] = []

    def make(*args: Any, **kwargs: Any) -> Guest:
        guests.append(Guest(*args, **kwargs))
        return guests[-1]

    yield make
    for made in guests:
        made.close()


@pytest.mark.parametrize("boot", [real_mode(), flat_mode()], ids=["real mode", "protected mode"])
def test_a_triple_fault_is_reported_as_shutdown_and_the_guest_starts_again_after_reset(
    guest: Callable[..., Guest], boot: Any
) -> None:
    g = guest(b"\xe6\x10" + b"\x0f\x0b", boot._replace(idt=boot.idt._replace(limit=0)))  # out PORT, al; ud2
    g.run()
    for _ in range(3):
        assert g.next()[0] == "port"
        index, reason, report = g.exits.get(timeout=PATIENCE)
        assert (index, reason) == (0, ExitReason.SHUTDOWN)
        # AMD processors do not say where it happened: KVM shows the registers of a processor after INIT.
        assert report.startswith("KVM_EXIT_SHUTDOWN: triple fault\nRAX=")
        assert "RIP=" in report
        g.pause()
        g.vcpus[0].reset()
        g.hypervisor.reset()
        g.resume()


def test_a_triple_fault_of_one_vcpu_leaves_the_others_to_be_paused(guest: Callable[..., Guest]) -> None:
    g = guest(INIT + SIPI + LOOP, flat_mode(), cpus=2)
    g.memory.write(0x2000, b"\x0f\x01\x1e\x00\x30\x0f\x0b")  # lidt [0x3000], which holds zeros; ud2
    g.run()
    index, reason, _ = g.exits.get(timeout=PATIENCE)
    assert (index, reason) == (1, ExitReason.SHUTDOWN)
    g.pause()


def test_a_thousand_pauses_lose_no_access_and_take_no_end(guest: Callable[..., Guest]) -> None:
    g = guest(COUNT, flat_mode()).run()
    expected = 0
    for _ in range(1000):
        g.pause()
        while not g.device.events.empty():
            assert g.next()[-1] == expected
            expected += 1
        g.resume()
    assert g.next()[-1] == expected


def test_a_thousand_pauses_of_vcpus_that_never_exit(guest: Callable[..., Guest]) -> None:
    g = guest(INIT + SIPI + LOOP, flat_mode(), cpus=4)
    g.memory.write(0x2000, b"\xe6\x10" + LOOP)
    g.run()
    for _ in range(3):
        g.next()
    for _ in range(250):  # times four vCPUs
        g.pause()
        g.resume()


def test_vcpus_that_all_access_a_device_at_once_each_get_their_own_answers(guest: Callable[..., Guest]) -> None:
    # each: id = (local APIC id); for ever: out PORT, al = id
    g = guest(INIT + SIPI + b"\xb0\x00\xe6\x10\xeb\xfa", flat_mode(), cpus=4)
    g.memory.write(0x2000, b"\x66\xb8\x01\0\0\0\x0f\xa2\x66\xc1\xeb\x18\x88\xd8\xe6\x10\xeb\xfa")
    seen: dict[int, set[str]] = {}
    done = threading.Event()

    def write(_offset: int, _size: int, value: int) -> None:
        seen.setdefault(value, set()).add(threading.current_thread().name)
        if len(seen) == 4:
            done.set()

    g.device.write = write  # type: ignore[method-assign]
    g.run()
    assert done.wait(PATIENCE)
    g.pause()
    assert seen == {i: {f"CPU {i}/Kvm"} for i in range(4)}


def test_state_moves_between_machines_with_several_vcpus(guest: Callable[..., Guest]) -> None:
    first = guest(INIT + SIPI + LOOP, flat_mode(), cpus=2)
    first.memory.write(0x2000, b"\x40\xe6\x10\xf4\xeb\xfd")  # inc ax; out PORT, al; hlt
    first.run()
    assert first.next()[-1] == 1
    first.pause()
    second = guest(LOOP, flat_mode(), cpus=2)
    second.memory.write(0, first.memory.read(0, 1 << 20))
    for old, new in zip(first.vcpus, second.vcpus, strict=True):
        new.start()
        new.restore(old.save())
    second.hypervisor.vm_state.restore(first.hypervisor.vm_state.save())
    second.resume()
    second.pause()
    for old, new in zip(first.vcpus, second.vcpus, strict=True):
        assert new.save().regs[:-16] == old.save().regs[:-16]  # all but RIP and RFLAGS
        assert new.save().mp_state == old.save().mp_state
