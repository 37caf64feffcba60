"""The virtio-mmio transport: registers, the status machine, and what a driver can do to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceState, VirtioDevice
from virtio_devices.mmio import (
    ACKNOWLEDGE,
    CONFIG_CHANGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    USED_BUFFER,
)
from virtio_devices.mmio_registers import SIZE
from virtio_devices.mmio_state import MmioState
from virtio_devices.queue import SplitQueue
from virtio_driver import MODERN, Driver, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.state import decode, encode

F_PRIVATE = 1 << 3
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Echo(VirtioDevice):
    """Writes what it reads. Two queues; 12 bytes of configuration, of which the driver may write the last 4."""

    device_type = 42

    def __init__(self, loop: DirectLoop, *, fail: bool = False) -> None:
        features = F_INDIRECT_DESC | F_EVENT_IDX | F_PRIVATE
        super().__init__("echo", [loop], features=features, queue_sizes=[64, 16], config=bytes(range(12)))
        self.fail = fail
        self.drains = 0
        self.closed = 0

    def write_config(self, offset: int, size: int, value: int) -> None:
        if offset == 8 and size == 4:
            self._patch_config(8, value.to_bytes(4, "little"))

    def accepts(self, features: int) -> bool:
        return not (features & F_PRIVATE and not features & F_INDIRECT_DESC)

    def _start(self) -> None:
        if self.fail:
            raise OSError(24, "Too many open files")

    def _process(self, index: int, queue: SplitQueue) -> None:
        for head, readable, writable in queue.chains():
            data = b"".join(readable)
            for view in writable:
                view[:] = data[: len(view)].ljust(len(view), b"\0")
            queue.add_used(head, sum(map(len, writable)))
        self._used(index, queue)

    def _drain(self, loop: object) -> None:
        self.drains += 1

    def resize(self, value: int) -> None:
        self._set_config(0, bytes([value]))


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def make(device: VirtioDevice | None = None) -> Driver:
        made.append(Driver(device or Echo(loop), memory, loop))
        return made[-1]

    yield make
    for driver in made:
        driver.close()
    assert not watched(loop), "a closed device watches nothing"


@pytest.fixture
def echo(make: Callable[..., Driver]) -> Driver:
    return make()


# Registers


def test_the_identity_registers_say_what_it_is(echo: Driver) -> None:
    assert echo.read(0x000).to_bytes(4, "little") == b"virt"
    assert echo.read(0x004) == 2
    assert echo.read(0x008) == 42
    assert echo.read(0x00C) == 0


def test_a_placeholder_has_device_id_0_and_nothing_else(memory: GuestMemory, loop: DirectLoop) -> None:
    driver = Driver(None, memory, loop)
    assert [driver.read(offset) for offset in range(0, 0x110, 4)] == [0x7472_6976, 2] + [0] * 66
    for offset in range(0, 0x200, 4):
        driver.write(offset, 0xF)
    assert driver.status == 0
    state = driver.transport.save()
    driver.transport.pause()
    driver.transport.restore(state)
    driver.transport.resume()
    driver.transport.reset()
    driver.transport.needs_reset("nobody cares")
    driver.close()


def test_features_come_in_words_and_words_beyond_are_empty(echo: Driver) -> None:
    assert echo.offered() == MODERN | F_PRIVATE
    for sel in (2, 0xFFFF_FFFF):
        echo.write(0x014, sel)
        assert echo.read(0x010) == 0


def test_queue_registers_of_a_queue_that_does_not_exist_read_0(echo: Driver) -> None:
    sizes = []
    for index in (0, 1, 2, 0x1_0000, 0xFFFF_FFFF):
        echo.write(0x030, index)
        sizes.append((echo.read(0x034), echo.read(0x044)))
    assert sizes == [(64, 0), (16, 0), (0, 0), (0, 0), (0, 0)]


def test_there_is_no_shared_memory_region(echo: Driver) -> None:
    echo.write(0x0AC, 0)
    assert [echo.read(offset) for offset in (0x0B0, 0x0B4, 0x0B8, 0x0BC)] == [0xFFFF_FFFF] * 4


def test_the_optional_queue_reset_register_does_nothing(echo: Driver) -> None:
    echo.start()
    echo.write(0x0C0, 1)
    assert echo.read(0x0C0) == 0
    assert echo.request(b"abc", 3) == (3, b"abc")


@pytest.mark.parametrize("offset", [0x010, 0x034, 0x060, 0x070, 0x0FC, 0x000, 0x0B0])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_read_in_another_width_are_0(echo: Driver, offset: int, size: int) -> None:
    echo.acknowledge()
    assert echo.read(offset, size) == 0


def test_registers_written_in_another_width_do_not_change(echo: Driver) -> None:
    for size in (1, 2, 8):
        echo.write(0x070, ACKNOWLEDGE, size)
    assert echo.status == 0


def test_unaligned_and_write_only_registers_read_0(echo: Driver) -> None:
    echo.start()
    assert [echo.read(offset) for offset in (0x001, 0x0B1, 0x014, 0x020, 0x038, 0x050, 0x064, 0x080, 0x0C4)] == [0] * 9


# Configuration space


def test_configuration_is_read_in_any_width_and_is_0_beyond_its_end(echo: Driver) -> None:
    assert [echo.config(1, 1), echo.config(2, 2), echo.config(4, 4)] == [1, 0x0302, 0x0706_0504]
    assert echo.config(0, 8) == 0x0706_0504_0302_0100
    assert [echo.config(10, 4), echo.config(12, 4), echo.config(0xFC, 4)] == [0x0B0A, 0, 0]


def test_configuration_is_written_once_there_is_a_driver(echo: Driver) -> None:
    echo.write(0x108, 1)
    assert echo.config(8, 4) == 0x0B0A_0908
    echo.acknowledge()
    echo.write(0x108, 1)
    assert echo.config(8, 4) == 1
    echo.status |= FAILED
    echo.write(0x108, 2)
    assert echo.config(8, 4) == 1


def test_a_configuration_change_raises_the_generation_and_one_interrupt_of_its_own_kind(echo: Driver) -> None:
    echo.start()
    before = echo.read(0x0FC)
    echo.device.resize(9)
    assert echo.config(0, 1) == 9
    assert echo.read(0x0FC) != before
    assert echo.read(0x060) == CONFIG_CHANGE
    assert echo.line.edges == 1


def test_a_configuration_change_before_driver_ok_raises_no_interrupt(echo: Driver) -> None:
    echo.negotiate()
    before = echo.read(0x0FC)
    echo.device.resize(9)
    assert echo.read(0x0FC) != before
    assert (echo.read(0x060), echo.line.edges) == (0, 0)


def test_a_device_without_writable_fields_ignores_writes(make: Callable[..., Driver], loop: DirectLoop) -> None:
    driver = make(VirtioDevice("plain", [loop], features=0, queue_sizes=[], config=b"\x05"))
    driver.negotiate()
    driver.write(0x100, 1, 1)
    assert driver.config(0, 1) == 5


# The status machine


def test_a_driver_gets_from_reset_to_driver_ok(echo: Driver) -> None:
    echo.start()
    assert echo.status == READY
    assert echo.device.active
    assert echo.request(b"abc", 3) == (3, b"abc")


@pytest.mark.parametrize("features", [0, F_INDIRECT_DESC, F_VERSION_1 | 1, F_VERSION_1 | 1 << 63, F_VERSION_1 | F_PRIVATE])
def test_features_ok_is_refused_without_version_1_with_unoffered_bits_or_a_mix_that_cannot_be(
    echo: Driver, features: int
) -> None:
    assert not echo.negotiate(features)
    echo.status = READY
    assert not echo.status & (FEATURES_OK | DRIVER_OK)
    assert not echo.device.active


def test_features_ok_is_refused_with_bits_beyond_63(echo: Driver) -> None:
    echo.acknowledge()
    echo.choose(MODERN)
    echo.write(0x024, 2)
    echo.write(0x020, 0)
    echo.write(0x024, 0xFFFF_FFFF)
    echo.write(0x020, 1)
    echo.status |= FEATURES_OK
    assert not echo.status & FEATURES_OK


def test_a_driver_may_choose_again_after_a_refusal(echo: Driver) -> None:
    assert not echo.negotiate(0)
    echo.choose(F_VERSION_1)
    echo.status |= FEATURES_OK
    assert echo.status & FEATURES_OK


def test_features_are_fixed_by_features_ok(echo: Driver) -> None:
    echo.negotiate(F_VERSION_1)
    echo.choose(MODERN)
    echo.rings = [echo.enable(0)]
    echo.status |= DRIVER_OK
    assert echo.device.negotiated == F_VERSION_1


def test_features_need_a_driver(echo: Driver) -> None:
    echo.choose(F_VERSION_1)
    echo.acknowledge()
    echo.status |= FEATURES_OK
    assert not echo.status & FEATURES_OK


def test_features_ok_needs_the_driver_bit(echo: Driver) -> None:
    echo.status = ACKNOWLEDGE
    echo.status |= FEATURES_OK
    assert echo.status == ACKNOWLEDGE


def test_a_status_bit_cannot_be_cleared(echo: Driver) -> None:
    echo.start()
    for value in (ACKNOWLEDGE, READY & ~DRIVER_OK, READY & ~ACKNOWLEDGE, 0x100 | ACKNOWLEDGE):
        echo.status = value
        assert echo.status == READY


def test_needs_reset_belongs_to_the_device(echo: Driver) -> None:
    echo.status = ACKNOWLEDGE | NEEDS_RESET | 0x30
    assert echo.status == ACKNOWLEDGE
    echo.transport.needs_reset("test")
    echo.status = ACKNOWLEDGE | DRIVER
    assert echo.status == ACKNOWLEDGE | DRIVER | NEEDS_RESET


def test_failed_ends_everything_but_reset(echo: Driver) -> None:
    echo.negotiate()
    echo.status |= FAILED
    echo.status = READY | FAILED
    assert not echo.device.active
    echo.status = 0
    assert echo.status == 0
    echo.start()
    assert echo.device.active


def test_failed_and_driver_ok_together_do_not_start_the_device(echo: Driver) -> None:
    echo.negotiate()
    echo.status = READY | FAILED
    assert not echo.device.active


def test_writing_0_is_a_whole_reset(echo: Driver) -> None:
    echo.start()
    echo.device.resize(1)
    echo.request(b"x", 1)
    echo.status = 0
    echo.write(0x030, 0)
    assert (echo.status, echo.read(0x060), echo.read(0x044)) == (0, 0, 0)
    assert not echo.device.active
    assert not watched(echo.loop)
    echo.offer(b"x", 1)
    echo.kick()
    assert echo.rings[0].collect() == [], "rings of before the reset are not touched"
    assert echo.start(F_VERSION_1).request(b"again", 5) == (5, b"again")


def test_back_end_trouble_at_driver_ok_asks_for_a_reset(make: Callable[..., Driver], loop: DirectLoop) -> None:
    driver = make(Echo(loop, fail=True))
    driver.start()
    assert driver.status == READY | NEEDS_RESET
    assert driver.read(0x060) == CONFIG_CHANGE
    assert "Too many open files" in driver.reports[0]
    driver.device.fail = False
    assert driver.restart().request(b"ok", 2) == (2, b"ok")


# Queues


def test_a_queue_is_ready_when_the_driver_said_so(echo: Driver) -> None:
    echo.negotiate()
    echo.enable(1)
    assert echo.read(0x044) == 1
    echo.write(0x030, 0)
    assert echo.read(0x044) == 0
    echo.write(0x030, 1)
    echo.write(0x044, 0)
    assert echo.read(0x044) == 0


def test_only_1_makes_a_queue_ready(echo: Driver) -> None:
    echo.negotiate()
    echo.enable(0)
    echo.write(0x044, 0)
    echo.write(0x044, 2)
    assert echo.read(0x044) == 0


def test_queue_registers_wait_for_features_ok(echo: Driver) -> None:
    echo.acknowledge()
    echo.enable(0)
    assert echo.read(0x044) == 0


def test_the_registers_of_a_ready_queue_are_fixed(echo: Driver) -> None:
    echo.negotiate()
    ring = echo.enable(0)
    echo.write(0x038, 4)
    echo.write(0x080, 0x7777_0000)
    state = echo.transport.save().queues[0]
    assert (state.size, state.desc) == (ring.size, ring.desc)


def test_addresses_have_64_bits_and_can_be_written_again(echo: Driver) -> None:
    echo.negotiate()
    echo.write(0x030, 0)
    for register in (0x080, 0x090, 0x0A0):
        echo.write(register + 4, 0xDEAD)
        echo.write(register, 0xBEEF)
        echo.write(register + 4, 1)
    state = echo.transport.save().queues[0]
    assert state.desc == state.driver == state.device == 0x1_0000_BEEF


def test_a_ring_that_is_not_ram_is_not_made_ready_and_asks_for_a_reset(echo: Driver) -> None:
    echo.negotiate()
    echo.write(0x030, 0)
    echo.write(0x038, 8)
    echo.write(0x084, 0x7FFF)
    echo.write(0x044, 1)
    assert echo.read(0x044) == 0
    assert echo.broken
    assert echo.line.edges == 0, "no driver is ready for an interrupt yet"
    echo.status |= DRIVER_OK
    assert echo.read(0x060) == CONFIG_CHANGE
    assert not echo.device.active


def test_a_queue_size_that_cannot_be_is_refused(echo: Driver) -> None:
    for size in (0, 3, 128, 0xFFFF_FFFF):
        echo.status = 0
        echo.negotiate()
        echo.write(0x030, 0)
        echo.write(0x038, size)
        echo.write(0x044, 1)
        assert (echo.read(0x044), echo.broken) == (0, True), size


def test_queues_that_are_not_enabled_are_left_alone(echo: Driver) -> None:
    echo.negotiate()
    echo.rings = [echo.enable(0)]
    echo.status |= DRIVER_OK
    echo.kick(1)
    assert echo.request(b"a", 1) == (1, b"a")


def test_a_live_queue_can_be_stopped(echo: Driver) -> None:
    echo.start()
    echo.write(0x030, 0)
    echo.write(0x044, 0)
    assert echo.read(0x044) == 0
    echo.offer(b"a", 1)
    echo.kick()
    assert echo.rings[0].collect() == []
    echo.write(0x044, 1)
    assert echo.read(0x044) == 0, "not without VIRTIO_F_RING_RESET"
    echo.write(0x044, 0)
    assert echo.request(b"b", 1, queue=1) == (1, b"b")


def test_ready_written_for_a_queue_that_does_not_exist_is_ignored(echo: Driver) -> None:
    echo.negotiate()
    echo.write(0x030, 7)
    echo.write(0x044, 1)
    assert not echo.broken


# Kicks and interrupts


def test_each_queue_has_its_own_doorbell(echo: Driver) -> None:
    echo.start()
    echo.offer(b"by descriptor", 13, queue=1)
    os.eventfd_write(echo.transport.notify_fds[1], 1)
    echo.loop.poll()
    assert len(echo.rings[1].collect()) == 1
    for wild in (2, 0x1_0001, 0xFFFF_FFFF):
        echo.write(0x050, wild)


def test_a_doorbell_before_driver_ok_is_remembered(echo: Driver) -> None:
    echo.negotiate()
    echo.rings = [echo.enable(0)]
    echo.offer(b"early", 5)
    echo.kick()
    assert echo.rings[0].collect() == []
    echo.status |= DRIVER_OK
    echo.loop.poll()
    assert len(echo.rings[0].collect()) == 1


def test_an_interrupt_stays_pending_until_it_is_acknowledged(echo: Driver) -> None:
    echo.start()
    echo.request(b"a", 1)
    echo.device.resize(1)
    assert echo.read(0x060) == USED_BUFFER | CONFIG_CHANGE
    echo.write(0x064, USED_BUFFER)
    assert echo.read(0x060) == CONFIG_CHANGE
    echo.write(0x064, 0xFFFF_FFFF)
    assert echo.read(0x060) == 0
    assert echo.line.edges == 2


def test_an_acknowledgement_that_only_the_hypervisor_saw_counts_when_the_driver_looks_again(echo: Driver) -> None:
    echo.start()
    echo.request(b"a", 1)
    echo.device.resize(1)
    assert echo.read(0x060) == USED_BUFFER | CONFIG_CHANGE
    assert echo.read(0x060) == USED_BUFFER | CONFIG_CHANGE
    os.eventfd_write(echo.transport.ack_fd, 1)
    assert echo.transport.interrupt_status == CONFIG_CHANGE
    assert echo.read(0x060) == CONFIG_CHANGE


def test_doorbells_are_each_queues_notification_and_the_acknowledgement_of_used_buffers(echo: Driver) -> None:
    transport = echo.transport
    queues = [(0x050, index, fd) for index, fd in enumerate(transport.notify_fds)]
    assert transport.doorbells == (*queues, (0x064, USED_BUFFER, transport.ack_fd))
    assert len(set(transport.doorbells)) == len(transport.device.queue_sizes) + 1
    echo.close()
    assert transport.doorbells == ()


def test_buffers_used_between_a_look_and_its_acknowledgement_stay_pending(echo: Driver) -> None:
    echo.start()
    echo.request(b"a", 1)
    assert echo.read(0x060) == USED_BUFFER
    echo.request(b"b", 1)  # the driver may have looked at its ring by now, or not
    os.eventfd_write(echo.transport.ack_fd, 1)
    assert echo.read(0x060) == USED_BUFFER
    os.eventfd_write(echo.transport.ack_fd, 1)
    assert echo.read(0x060) == 0


def test_acknowledgements_of_nothing_take_nothing_away_later(make: Callable[..., Driver]) -> None:
    echo = make().start(MODERN)
    for _ in range(3):
        os.eventfd_write(echo.transport.ack_fd, 1)
    assert echo.read(0x060) == 0
    echo.request(b"a", 1)
    assert echo.read(0x060) == USED_BUFFER
    os.eventfd_write(echo.transport.ack_fd, 1)
    echo.transport.pause()
    state = echo.transport.save()
    assert state.interrupt_status == 0
    other = make()
    os.eventfd_write(other.transport.ack_fd, 1)
    other.transport.restore(state._replace(interrupt_status=USED_BUFFER))
    assert other.read(0x060) == USED_BUFFER, "what came before it was restored is of another life"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(("use", "change", "save", "move", "driver", "driver", "driver")), max_size=40), st.booleans())
def test_nothing_is_missed_however_device_and_driver_take_turns(steps: list[str], in_memory: bool) -> None:
    """A driver looks, acknowledges what it has seen, and then goes through its rings and configuration, as Linux does."""
    loop, memory = new_loop(), GuestMemory([(0, 1 << 20)])
    drivers: list[Driver] = []
    registers = memoryview(bytearray(SIZE))

    def arrive() -> Driver:
        if drivers:
            drivers[-1].transport.mirror(None)
        drivers.append(Driver(Echo(loop), memory, loop))
        if in_memory:
            drivers[-1].transport.mirror(registers)
        return drivers[-1]

    def look() -> int:
        return registers.cast("I")[0x060 >> 2] if in_memory else drivers[-1].read(0x060)

    arrive().start(MODERN)
    used = changes = used_seen = changes_seen = told = heard = 0

    def handler() -> Iterator[None]:
        nonlocal used_seen, changes_seen
        pending = look()
        yield
        if pending == USED_BUFFER:
            os.eventfd_write(drivers[-1].transport.ack_fd, 1)
        elif pending:
            drivers[-1].write(0x064, pending)
        yield
        if pending & CONFIG_CHANGE:
            changes_seen = changes
        if pending & USED_BUFFER:
            used_seen = used

    running: Iterator[None] | None = None
    for step in [*steps, *["driver"] * 8]:
        transport = drivers[-1].transport
        if step == "use":
            used += 1
            transport.queue_used(0)
            told += 1
        elif step == "change":
            changes += 1
            transport.config_changed()
            told += 1
        elif step in ("save", "move"):
            transport.pause()
            state = transport.save()
            if step == "move":
                arrive().transport.restore(state)
            drivers[-1].transport.resume()
        elif running is None and heard < told:  # edges that come together are one
            heard, running = told, handler()
        if step == "driver" and running is not None and next(running, running) is running:
            running = None
    for driver in drivers:
        driver.close()
    loop.close()
    memory.close()
    assert (used_seen, changes_seen) == (used, changes)


STEPS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(range(0, 0x110, 4)), st.sampled_from((0, 1, 2, 3, 8, 11, 15, 0xFFFF_FFFF))),
    st.tuples(
        st.sampled_from(("use", "change", "break", "outside", "move", "start", "reset", "offer", "feature")),
        st.just(0),
        st.just(0),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
@example([("feature", 0, 0), ("write", 0x014, 1), ("feature", 0, 0)])
@example([("start", 0, 0), ("use", 0, 0), ("ack", 0, 0), ("change", 0, 0), ("write", 0x064, 3)])
def test_registers_in_memory_are_what_the_bus_answers(steps: list[tuple[str, int, int]]) -> None:
    loop, memory = new_loop(), GuestMemory([(0, 1 << 20)])
    driver = Driver(Echo(loop), memory, loop)
    registers = memoryview(bytearray(b"\xaa" * SIZE))
    driver.transport.mirror(registers)
    for step, offset, value in [("look", 0, 0), *steps]:
        transport, device = driver.transport, driver.device
        if step == "write":
            driver.write(offset, value)
        elif step == "use":
            transport.queue_used(0)
        elif step == "change":
            device.resize(value)
        elif step == "break":
            transport.needs_reset("a test")
        elif step == "outside":
            transport.used_fd(0)
        elif step == "move":
            transport.pause()
            with suppress(StateError):  # of features that are not offered any more
                transport.restore(transport.save())
            transport.resume()
        elif step == "start":
            driver.status = 0
            driver.start()
        elif step == "reset":
            transport.reset()
        elif step == "ack":
            os.eventfd_write(transport.ack_fd, 1)
        elif step == "feature":
            device.features ^= F_PRIVATE | 1 << 40
        elif step == "offer" and driver.rings and device.active:
            driver.offer(b"a", 1)
            driver.kick()
        assert registers.cast("I").tolist() == [driver.read(at) for at in range(0, SIZE, 4)], step
    driver.transport.mirror(None)
    last = bytes(registers)
    driver.device.resize(9)
    driver.transport.queue_used(0)
    driver.close()
    loop.close()
    memory.close()
    assert bytes(registers) == last, "nobody looks at it any more"


def test_registers_in_memory_tell_of_an_interrupt_before_it_comes(echo: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    registers = memoryview(bytearray(SIZE))
    echo.transport.mirror(registers)
    echo.start()
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(echo.line, "trigger", lambda: seen.append((registers[0x060], registers[0x070], registers[0x100])))
    echo.transport.queue_used(0)
    echo.device.resize(5)
    echo.write(0x064, USED_BUFFER | CONFIG_CHANGE)
    assert registers[0x060] == USED_BUFFER, "until the reset, as acknowledgements may be events that nobody sees"
    echo.transport.queue_used(1)
    echo.transport.needs_reset("a test")
    assert seen == [
        (USED_BUFFER, READY, 0),
        (USED_BUFFER | CONFIG_CHANGE, READY, 5),
        (USED_BUFFER, READY, 5),
        (USED_BUFFER | CONFIG_CHANGE, READY | NEEDS_RESET, 5),
    ]


def test_a_longer_configuration_space_than_the_window_is_shown_as_far_as_it_fits(
    make: Callable[..., Driver], loop: DirectLoop
) -> None:
    device = VirtioDevice("long", [loop], features=0, queue_sizes=[64], config=bytes(range(256)) * 2)
    registers = memoryview(bytearray(SIZE))
    make(device).transport.mirror(registers)
    assert bytes(registers[0x100:]) == bytes(range(256))


def test_suppressed_interrupts_are_not_sent(echo: Driver) -> None:
    echo.start()
    echo.rings[0].suppress_interrupts()
    echo.request(b"a", 1)
    assert (echo.read(0x060), echo.line.edges) == (0, 0)


def test_a_broken_ring_breaks_the_device_and_not_the_loop(echo: Driver) -> None:
    echo.start()
    echo.rings[0].offer(63)
    echo.kick()
    assert echo.status == READY | NEEDS_RESET
    assert (echo.read(0x060), echo.line.edges) == (CONFIG_CHANGE, 1)
    assert echo.reports == ["echo: queue 0: descriptor 63 of a table of 8"]
    assert echo.transport.needs_reset_reason == echo.reports[0]
    echo.offer(b"a", 1, queue=1)
    echo.kick(1)
    echo.kick(0)
    assert echo.rings[1].collect() == [], "a broken device serves nothing"
    assert len(echo.reports) == 1
    assert echo.restart().request(b"works", 5) == (5, b"works")


def test_a_driver_that_breaks_its_device_again_and_again_does_not_fill_the_log(
    make: Callable[..., Driver], loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtio_devices.mmio.MonotonicClock", lambda: loop.clock)
    echo = make()

    def break_it() -> None:
        echo.status = 0
        echo.start()
        echo.rings[0].offer(63)
        echo.kick()
        assert echo.broken

    for _ in range(100):
        break_it()
    reason = "echo: queue 0: descriptor 63 of a table of 8"
    assert echo.reports == [reason] * 11
    loop.clock.advance(1_000_000_000)
    break_it()
    break_it()
    assert echo.reports[11:] == [f"{reason} (89 before it not shown)"]
    assert echo.transport.needs_reset_reason == reason


# Life cycle


def test_a_paused_device_does_nothing_and_then_catches_up(echo: Driver) -> None:
    echo.start()
    echo.transport.pause()
    echo.transport.pause()
    assert echo.device.drains == 1
    echo.offer(b"a", 1)
    echo.kick()
    assert echo.rings[0].collect() == []
    echo.transport.resume()
    echo.transport.resume()
    echo.loop.poll()
    assert len(echo.rings[0].collect()) == 1


def test_a_device_can_be_activated_reset_and_stopped_while_paused(echo: Driver) -> None:
    echo.transport.pause()
    echo.start()
    echo.offer(b"a", 1)
    echo.kick()
    assert echo.rings[0].collect() == []
    echo.write(0x030, 1)
    echo.write(0x044, 0)
    echo.status = 0
    echo.transport.resume()
    echo.start()
    assert echo.request(b"a", 1) == (1, b"a")


def test_closing_twice_is_fine_and_gives_every_descriptor_back(memory: GuestMemory, loop: DirectLoop) -> None:
    before = descriptors(settle=True)
    driver = Driver(Echo(loop), memory, loop).start()
    driver.close()
    driver.close()
    assert descriptors() == before
    driver.write(0x050, 0)


def test_a_closed_transport_keeps_no_guest_memory_mapped(loop: DirectLoop) -> None:
    memory = GuestMemory([(0, 1 << 20)], share=True)
    driver = Driver(Echo(loop), memory, loop).start()
    driver.request(b"x", 1)
    driver.close()
    memory.close()
    assert "stratovirt_anon_mem" not in Path("/proc/self/maps").read_text()


def test_doorbells_that_cannot_be_made_leave_nothing_behind(
    memory: GuestMemory, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors(settle=True)
    real, calls = os.eventfd, []

    def limited(*args: int) -> int:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(24, "Too many open files")
        return real(*args)

    monkeypatch.setattr(os, "eventfd", limited)
    with pytest.raises(OSError, match="Too many"):
        Driver(Echo(loop), memory, loop)
    assert descriptors() == before


def test_a_device_needs_a_loop_and_is_activated_once(make: Callable[..., Driver], loop: DirectLoop) -> None:
    with pytest.raises(ValueError, match="needs a loop"):
        VirtioDevice("x", [], features=0, queue_sizes=[1])
    driver = make().start()
    with pytest.raises(ValueError, match="active already"):
        driver.device.activate(0, [], [])


# Saved state


def test_a_live_device_goes_on_after_save_and_restore(make: Callable[..., Driver]) -> None:
    old, new = make(), make()
    old.start(MODERN)
    old.request(b"a", 1)
    old.offer(b"waiting", 7)
    old.transport.pause()
    state = old.transport.save()
    new.transport.restore(decode(encode(state), MmioState, "echo"))
    new.device.restore(decode(encode(old.device.save()), DeviceState, "echo"))
    assert new.transport.save() == state
    new.rings = old.rings
    assert new.rings[0].collect() == []
    new.transport.resume()
    new.loop.poll()
    assert new.rings[0].collect() == [(2, 7)]
    assert new.read(0x060) & USED_BUFFER


@given(st.lists(st.integers(0, 6), max_size=6))
@settings(max_examples=100)
def test_every_step_of_negotiation_survives_save_and_restore(steps: list[int]) -> None:
    memory, loop = GuestMemory([(0, 1 << 20)]), new_loop()
    old, new = Driver(Echo(loop), memory, loop), Driver(Echo(loop), memory, loop)
    actions: list[Callable[[], object]] = [
        old.acknowledge,
        lambda: old.choose(MODERN),
        lambda: setattr(old, "status", old.status | FEATURES_OK),
        lambda: old.enable(0),
        lambda: old.enable(1),
        lambda: setattr(old, "status", old.status | DRIVER_OK),
        lambda: old.transport.needs_reset("test"),
    ]
    for step in sorted(steps):
        actions[step]()
    old.transport.pause()
    state = old.transport.save()
    new.transport.restore(state)
    assert new.transport.save() == state
    assert new.device.active == (old.device.active and not old.broken)
    old.close()
    new.close()
    loop.close()


def test_states_that_cannot_be_are_refused_and_leave_a_reset_device(make: Callable[..., Driver]) -> None:
    driver = make().start()
    driver.transport.pause()
    state = driver.transport.save()
    queue = state.queues[0]
    bad = [
        state._replace(device_type=2),
        state._replace(queues=state.queues[:1]),
        state._replace(status=0x1F),
        state._replace(status=DRIVER_OK | DRIVER | ACKNOWLEDGE),
        state._replace(status=0),
        state._replace(queue_sel=-1),
        state._replace(driver_features=-1),
        state._replace(driver_features=F_VERSION_1 | 1),
        state._replace(driver_features=1 << 64),
        state._replace(queues=(queue._replace(size=7), state.queues[1])),
        state._replace(queues=(queue._replace(desc=-16), state.queues[1])),
        state._replace(queues=(queue._replace(desc=1 << 70), state.queues[1])),
        state._replace(queues=(queue._replace(next_avail=70000), state.queues[1])),
    ]
    for wrong in bad:
        with pytest.raises(StateError, match="echo"):
            driver.transport.restore(wrong)
        assert driver.status == 0
        assert not driver.device.active
    with pytest.raises(StateError, match="expected a state"):
        driver.transport.restore(DeviceState(42))
    with pytest.raises(StateError, match="device type 2"):
        driver.device.restore(DeviceState(2))
    driver.transport.restore(state)
    assert driver.transport.save() == state


# Anything at all


REGISTERS = [
    0x014,
    0x020,
    0x024,
    0x030,
    0x038,
    0x044,
    0x050,
    0x064,
    0x070,
    0x080,
    0x084,
    0x090,
    0x094,
    0x0A0,
    0x0A4,
    0x0AC,
    0x0C0,
]
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 0xB, 0xF, 0x1000, 0x1080, 0x10C0, 0x80, 0xFFFF_FFFF, MODERN & 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)
WRITES = st.tuples(st.one_of(st.sampled_from(REGISTERS), st.integers(0, 0x1FF)), st.sampled_from([4, 4, 4, 4, 1, 2, 8]), VALUES)


def check_writes(writes: list[tuple[int, int, int]], live: bool) -> None:
    """Write whatever to whichever register: nothing escapes, and the device works after a reset."""
    memory, loop = GuestMemory([(0, 1 << 20)]), new_loop()
    driver = Driver(Echo(loop), memory, loop)
    try:
        if live:
            driver.start()
        for offset, size, value in writes:
            driver.write(offset, value & ((1 << 8 * size) - 1), size)
            assert 0 <= driver.read(offset, size) < 1 << 8 * size
            loop.poll()
            assert driver.device.active <= bool(driver.status & DRIVER_OK)
        assert driver.restart().request(b"works", 5) == (5, b"works")
    finally:
        driver.close()
        assert not watched(loop)
        loop.close()


@given(st.lists(WRITES, max_size=60), st.booleans())
@settings(max_examples=500)
def test_no_sequence_of_register_writes_escapes_and_reset_always_works(writes: list[tuple[int, int, int]], live: bool) -> None:
    check_writes(writes, live)
