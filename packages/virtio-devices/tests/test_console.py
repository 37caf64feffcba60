"""The console: what is typed arrives, what is said arrives, and who is slow makes the other wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_devices.console.device import F_MULTIPORT, F_SIZE, ConsoleDevice, ConsoleState
from virtio_devices.console.port import ConsolePort, PortState
from virtio_devices.device import F_VERSION_1, DeviceState
from virtio_driver import DATA, Driver, new_loop, watched
from vmm_core.devices.chardev import FdBackend
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.state import decode, encode

if TYPE_CHECKING:
    from vmm_core.devices.chardev import CharFrontend
    from vmm_core.loop import Loop


RECEIVE, TRANSMIT = 0, 1  # queues of port 0 (5.3.2)


class Terminal:
    """A host's end that takes as much output as the test allows, and types when there is room."""

    def __init__(self, takes: int = 1 << 40) -> None:
        self.typed = bytearray()  # not read by the device yet
        self.shown = bytearray()
        self.takes = takes
        self.pieces: list[int] = []
        self.closed = False
        self.frontend: CharFrontend | None = None

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        self.loop, self.frontend = loop, frontend
        frontend.peer_changed(True)

    def type(self, data: bytes) -> None:
        self.typed += data
        self.input_wanted()

    def input_wanted(self) -> None:
        self.loop.call_soon(self._feed)

    def _feed(self) -> None:
        assert self.frontend is not None
        while self.typed and (room := self.frontend.input_room()):
            data = bytes(self.typed[:room])
            del self.typed[:room]
            self.frontend.receive(data)

    def write(self, data: bytes | memoryview) -> int:
        taken = min(len(data), self.takes)
        self.pieces.append(len(data))
        self.takes -= taken
        self.shown += data[:taken]
        return taken

    def allow(self, count: int) -> None:
        self.takes += count
        assert self.frontend is not None
        self.loop.call_soon(self.frontend.output_ready)

    def close(self) -> None:
        self.closed = True


class Console(Driver):
    """A console's driver that knows of one port."""

    @property
    def port(self) -> ConsolePort:
        return self.device.ports[0]

    def start(self, features: int | None = F_VERSION_1, *, size: int = 8, without: int = 0) -> Driver:
        return super().start(features, size=size, without=without)

    @property
    def terminal(self) -> Terminal:
        backend = self.port._backend
        assert isinstance(backend, Terminal)
        return backend

    def room(self, *lengths: int) -> None:
        """Offer receive buffers."""
        for length in lengths:
            self.offer(length, queue=RECEIVE)
        self.kick(RECEIVE)

    def say(self, *parts: bytes) -> None:
        self.offer(*parts, queue=TRANSMIT)
        self.kick(TRANSMIT)

    def heard(self) -> bytes:
        """Collect received bytes. Buffers are offered one after the other from DATA, 16 bytes aligned, by room()."""
        ring, memory = self.rings[RECEIVE], self.memory
        data = b""
        for head, written in ring.collect():
            data += memory.read(memory.load(ring.desc + 16 * head, 8), written) if written else b""
        return data


Make = Callable[..., Console]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[Console] = []

    def make(terminal: Terminal | None = None) -> Console:
        device = ConsoleDevice("console0", loop)
        device.add_port(0, "con", console=True).connect(terminal or Terminal())
        made.append(Console(device, memory, loop))
        return made[-1]

    yield make
    for driver in made:
        terminal = driver.terminal if driver.port._backend else None
        driver.close()
        driver.close()
        assert terminal is None or terminal.closed
    assert not watched(loop)


def test_it_offers_what_works(make: Make) -> None:
    driver = make()
    assert driver.offered() == F_VERSION_1 | F_MULTIPORT | F_SIZE
    assert [driver.config(offset, 4) for offset in (0, 4, 8)] == [0, 1, 0]
    assert driver.port.connected


# Input


def test_what_is_typed_arrives(make: Make) -> None:
    driver = make().start()
    driver.room(8, 8)
    driver.terminal.type(b"ls\n")
    driver.loop.poll()
    assert driver.heard() == b"ls\n"
    assert driver.line.edges == 1


def test_what_is_typed_before_there_is_a_driver_waits_for_it(make: Make) -> None:
    driver = make()
    driver.terminal.type(b"early")
    driver.loop.poll()
    assert driver.terminal.typed == b"early", "it waits at the host"
    driver.start()
    driver.room(8)
    assert driver.heard() == b"early"


def test_input_waits_at_the_host_for_buffers(make: Make) -> None:
    driver = make().start()
    driver.terminal.type(b"0123456789")
    driver.loop.poll()
    assert driver.terminal.typed == b"0123456789"
    driver.room(4)
    assert (driver.heard(), driver.terminal.typed) == (b"0123", b"456789")
    driver.room(4, 4)
    assert (driver.heard(), driver.terminal.typed) == (b"456789", b"")


def test_kicks_for_buffers_are_only_wanted_while_input_waits(make: Make) -> None:
    driver = make().start()
    driver.room(4, 4)
    assert driver.rings[RECEIVE].kicks_unwanted
    driver.terminal.type(b"012345678")
    driver.loop.poll()
    assert not driver.rings[RECEIVE].kicks_unwanted


def test_a_large_buffer_is_filled_in_parts(make: Make, memory: GuestMemory) -> None:
    driver = make().start()
    driver.room(0x2000, 0x2000)
    driver.terminal.type(b"x" * 6000)
    driver.loop.poll()
    assert driver.heard() == b"x" * 6000


def test_room_that_is_taken_away_loses_no_byte(make: Make) -> None:
    """A driver that rewrites its descriptors after the device has looked at them."""
    driver = make().start()
    driver.room(8)
    frontend = driver.port
    assert frontend.input_room() == 8
    ring = driver.rings[RECEIVE]
    ring.descriptor(0, DATA, 3, 2)
    frontend.receive(b"01234567")
    assert driver.heard() == b"012"
    assert frontend.input_room() == 0, "first what waits"
    assert driver.device.save() == ConsoleState(False, (PortState(0, b"34567", 0, False, False, False),), ())
    driver.room(2)
    assert driver.heard() == b"34"
    driver.terminal.type(b"89")
    driver.room(8, 8)
    assert driver.heard() == b"56789"


def test_input_for_a_driver_that_is_gone_waits_for_the_next(make: Make) -> None:
    driver = make().start()
    driver.room(8)
    assert driver.port.input_room() == 8
    driver.status = 0
    driver.port.receive(b"kept")
    driver.restart()
    driver.room(8)
    assert driver.heard() == b"kept"


def test_a_paused_console_takes_nothing(make: Make) -> None:
    driver = make().start()
    driver.room(8)
    driver.transport.pause()
    driver.terminal.type(b"a")
    driver.loop.poll()
    assert driver.terminal.typed == b"a"
    driver.transport.resume()
    driver.loop.poll()
    assert driver.heard() == b"a"


@pytest.mark.parametrize("at", ["input_room", "receive", "kick"])
def test_a_receive_buffer_that_cannot_be_written_breaks_the_device(make: Make, at: str) -> None:
    driver = make().start()
    port = driver.port
    if at == "kick":
        port._waiting = b"waiting"
    driver.offer(b"readable", queue=RECEIVE)
    if at == "input_room":
        assert port.input_room() == 0
    elif at == "receive":
        port.receive(b"x")
    else:
        driver.kick(RECEIVE)
    assert driver.broken
    assert port.input_room() == 0
    port._waiting = b""
    driver.restart()
    driver.room(4)
    driver.terminal.type(b"ok")
    driver.loop.poll()
    assert driver.heard() == b"ok"


# Output


def test_what_the_guest_says_is_shown_in_order(make: Make) -> None:
    driver = make().start()
    driver.say(b"login", b": ")
    driver.say(b"$ ")
    assert driver.terminal.shown == b"login: $ "
    assert driver.rings[TRANSMIT].collect() == [(0, 0), (2, 0)]


def test_bytes_are_counted_when_they_have_arrived(make: Make) -> None:
    driver = make(Terminal(takes=7)).start()
    driver.say(b"0123", b"4567")
    driver.room(8)
    driver.terminal.type(b"ls\n")
    driver.loop.poll()
    assert driver.device.counters() == {"port0_rx_bytes": 3, "port0_tx_bytes": 7}


def test_a_guest_waits_for_a_host_that_takes_nothing(make: Make) -> None:
    driver = make(Terminal(takes=0)).start()
    driver.say(b"0123")
    driver.say(b"4567", b"89")
    assert driver.rings[TRANSMIT].collect() == []
    for count, done in ((3, 0), (1, 1), (5, 0), (100, 1)):
        driver.terminal.allow(count)
        driver.loop.poll()
        assert len(driver.rings[TRANSMIT].collect()) == done
    assert driver.terminal.shown == b"0123456789"


def test_output_that_is_half_taken_survives_pause_save_and_restore(make: Make, loop: DirectLoop) -> None:
    old = make(Terminal(takes=2)).start()
    old.say(b"0123", b"45")
    old.transport.pause()
    old.terminal.allow(2)
    loop.poll()
    assert old.terminal.shown == b"01"
    states = old.transport.save(), decode(encode(old.device.save()), ConsoleState, "console")
    new = make()
    new.transport.restore(states[0])
    new.device.restore(states[1])
    assert new.device.save() == states[1]
    new.transport.resume()
    loop.poll()
    assert new.terminal.shown == b"2345"


def test_a_reset_forgets_output_that_was_half_taken(make: Make) -> None:
    driver = make(Terminal(takes=2)).start()
    driver.say(b"0123")
    driver.restart()
    driver.terminal.allow(100)
    driver.say(b"abcd")
    assert driver.terminal.shown == b"01abcd"


def test_a_long_output_gives_the_loop_its_turn_and_arrives_in_pieces(make: Make, memory: GuestMemory) -> None:
    driver = make().start()
    memory.write(DATA, os.urandom(0x8_0000))
    ring = driver.rings[TRANSMIT]
    ring.offer(ring.chain((DATA, 0x8_0000, False)))
    shown: list[int] = []
    driver.loop.call_soon(lambda: shown.append(len(driver.terminal.shown)))
    driver.kick(TRANSMIT)
    assert 0 < shown[0] < 0x8_0000
    assert driver.terminal.shown == memory.read(DATA, 0x8_0000)
    assert max(driver.terminal.pieces) <= 0x1_0000
    assert ring.collect() == [(0, 0)]


def test_a_transmit_buffer_that_cannot_be_read_breaks_the_device(make: Make) -> None:
    driver = make().start()
    driver.offer(8, queue=TRANSMIT)
    driver.kick(TRANSMIT)
    assert driver.broken
    driver.restart().say(b"ok")
    assert driver.terminal.shown == b"ok"


def test_without_a_host_s_end_output_is_dropped(memory: GuestMemory, loop: DirectLoop) -> None:
    device = ConsoleDevice("console0", loop)
    device.add_port(0, "con", console=True)
    driver = Console(device, memory, loop)
    driver.start()
    driver.say(b"nobody hears this")
    driver.room(8)
    assert driver.rings[TRANSMIT].collect() == [(0, 0)]
    driver.close()


# State and a real back end


FRESH = PortState(0, b"", 0, False, False, False)


@pytest.mark.parametrize(
    ("ports", "messages"),
    [
        ((), ()),
        ((FRESH._replace(waiting=b"x" * 4097),), ()),
        ((FRESH._replace(sent=-1),), ()),
        ((FRESH._replace(nr=1),), ()),
        ((FRESH,) * 2, ()),
        ((FRESH,), (b"short",)),
        ((FRESH,), (bytes(300),)),
        ((FRESH,), (b"\1" + bytes(7),)),
        ((FRESH,), (bytes(4) + b"\x08" + bytes(3),)),
        ((FRESH,), (bytes(6) + b"\2\0",)),
    ],
)
def test_states_that_cannot_be_are_refused(make: Make, ports: tuple[PortState, ...], messages: tuple[bytes, ...]) -> None:
    driver = make()
    with pytest.raises(StateError, match="console0"):
        driver.device.restore(ConsoleState(False, ports, messages))
    with pytest.raises(StateError, match="console0"):
        driver.device.restore(DeviceState(3))


def test_bytes_go_both_ways_through_a_real_back_end(memory: GuestMemory, loop: DirectLoop) -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC), os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    device = ConsoleDevice("console0", loop)
    device.add_port(0, "con", console=True).connect(FdBackend("pipes", ours[0], theirs[1], print))
    driver = Console(device, memory, loop)
    driver.start()
    os.write(ours[1], b"typed")
    driver.room(8)
    driver.say(b"shown")
    assert (driver.heard(), os.read(theirs[0], 100)) == (b"typed", b"shown")
    driver.close()
    for fd in (ours[1], theirs[0]):
        os.close(fd)


ACTIONS = st.one_of(
    st.tuples(st.just("type"), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("room"), st.integers(1, 30)),
    st.tuples(st.just("say"), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("allow"), st.integers(1, 50)),
    st.tuples(st.just("pause"), st.none()),
)


def check_actions(actions: list[tuple[str, object]]) -> None:
    """Let both sides act as they like: what is heard is what was typed, and what is shown what was said."""
    memory, loop = GuestMemory([(0, 1 << 20)]), new_loop()
    device = ConsoleDevice("console0", loop)
    terminal = Terminal(takes=0)
    device.add_port(0, "con", console=True).connect(terminal)
    driver = Console(device, memory, loop)
    typed = said = heard = b""
    try:
        driver.start(size=64)
        for name, value in actions:
            if name == "type":
                typed += value
                terminal.type(value)
            elif name == "room":
                driver.room(value)
            elif name == "say":
                said += value
                driver.say(value)
            elif name == "allow":
                terminal.allow(value)
            else:
                driver.transport.pause()
                driver.loop.poll()
                driver.transport.resume()
            loop.poll()
            heard += driver.heard()
        driver.room(1000)
        driver.room(1000)
        terminal.allow(1 << 20)
        loop.poll()
        heard += driver.heard()
        assert (heard, bytes(terminal.shown)) == (typed, said)
    finally:
        driver.close()
        loop.close()


@given(st.lists(ACTIONS, max_size=30))
@settings(max_examples=300)
def test_no_byte_is_lost_or_out_of_order_either_way(actions: list[tuple[str, object]]) -> None:
    check_actions(actions)
