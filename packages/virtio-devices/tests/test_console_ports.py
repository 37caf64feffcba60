"""A console with many ports: who hears of what, who waits for whom, and what a hostile driver gets out of it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_console import Terminal
from virtio_devices.console.control import (
    CONSOLE_PORT,
    DEVICE_READY,
    NAME_MAX,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    PORT_REMOVE,
)
from virtio_devices.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, MAX_PORTS, ConsoleDevice, ConsoleState
from virtio_devices.device import F_VERSION_1, DeviceError
from virtio_driver import DATA, Driver, new_loop, watched
from vmm_core.clock import MonotonicClock
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory
from vmm_core.state import decode, encode
from vmm_core.threads import IoThread

Message = tuple[int, int, int, bytes]  # id, event, value, what follows


class Peer(Terminal):
    """A host's end where somebody is only from arrive() to leave()."""

    def start(self, loop: object, frontend: object) -> None:
        self.loop, self.frontend = loop, frontend  # type: ignore[assignment]

    def arrive(self) -> None:
        assert self.frontend is not None
        self.frontend.peer_changed(True)

    def leave(self) -> None:
        assert self.frontend is not None
        self.frontend.peer_changed(False)


class Guest(Driver):
    """A driver that speaks of ports. `terminals` are the back ends by port."""

    def __init__(self, memory: GuestMemory, loop: DirectLoop, ports: int = 3, max_ports: int = 4) -> None:
        self.console = ConsoleDevice("console0", loop, max_ports)
        self.terminals: dict[int, Peer] = {}
        super().__init__(self.console, memory, loop)
        for nr in range(ports):
            self.add(nr)

    def add(self, nr: int, *, console: bool | None = None) -> None:
        """Add a port called `port<nr>`; number 0 is a console unless `console` says otherwise."""
        self.terminals[nr] = Peer()
        self.console.add_port(nr, f"port{nr}", console=nr == 0 if console is None else console).connect(self.terminals[nr])

    def room(self, queue: int, *lengths: int) -> None:
        for length in lengths:
            self.offer(length, queue=queue)
        self.kick(queue)

    def heard(self, queue: int) -> list[bytes]:
        """What the device wrote since the last time, a buffer an item."""
        ring = self.rings[queue]
        return [self.memory.read(self.memory.load(ring.desc + 16 * head, 8), length) for head, length in ring.collect()]

    def tell(self, nr: int, event: int, value: int = 1) -> None:
        self.offer(struct.pack("<IHH", nr, event, value), queue=CONTROL_TRANSMIT)
        self.kick(CONTROL_TRANSMIT)
        self.rings[CONTROL_TRANSMIT].collect()

    def told(self) -> list[Message]:
        return [(*struct.unpack("<IHH", text[:8]), text[8:]) for text in self.heard(CONTROL_RECEIVE)]

    def come_up(self, *opened: int, room: int = 16) -> None:
        """Do what Linux does: take every port, and have programs open some. `room` is for how many messages."""
        self.room(CONTROL_RECEIVE, *[64] * room)
        self.tell(0, DEVICE_READY)
        for nr, event, _, _ in self.told():
            if event == PORT_ADD:
                self.tell(nr, PORT_READY)
        for nr in opened:
            self.tell(nr, PORT_OPEN)
        self.told()

    def restart(self) -> Driver:
        self.status = 0
        self._next = DATA
        return self.start(size=32)


def receive_queue(nr: int) -> int:
    return 2 * nr + 2 if nr else 0  # 5.3.2


def transmit_queue(nr: int) -> int:
    return receive_queue(nr) + 1


Make = Callable[..., Guest]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[Guest] = []

    def make(ports: int = 3, max_ports: int = 4) -> Guest:
        made.append(Guest(memory, loop, ports, max_ports))
        return made[-1]

    yield make
    for guest in made:
        guest.close()
        assert all(terminal.closed for terminal in guest.terminals.values())
    assert not watched(loop)


# Who hears of what


def test_a_driver_hears_of_every_port_in_order_when_it_is_ready(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, *[64] * 8)
    assert guest.told() == [], "not before it says that it is ready"
    guest.tell(0, DEVICE_READY)
    assert guest.told() == [(nr, PORT_ADD, 1, b"") for nr in range(3)]


def test_a_console_is_open_at_once_and_any_port_has_its_name(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, *[64] * 16)
    guest.tell(0, DEVICE_READY)
    guest.told()
    guest.tell(0, PORT_READY)
    assert guest.told() == [(0, CONSOLE_PORT, 1, b""), (0, PORT_NAME, 1, b"port0\0"), (0, PORT_OPEN, 1, b"")]
    guest.tell(1, PORT_READY)
    assert guest.told() == [(1, PORT_NAME, 1, b"port1\0")], "nobody is at the host's end"
    guest.terminals[2].arrive()
    assert guest.told() == [], "the driver is not ready for the port"
    guest.tell(2, PORT_READY)
    assert guest.told() == [(2, PORT_NAME, 1, b"port2\0"), (2, PORT_OPEN, 1, b"")]


def test_a_peer_that_comes_or_goes_is_told_for_a_port_and_not_for_a_console(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up()
    for terminal in guest.terminals.values():
        terminal.arrive()
    assert guest.told() == [(1, PORT_OPEN, 1, b""), (2, PORT_OPEN, 1, b"")]
    guest.terminals[2].leave()
    guest.terminals[0].leave()
    assert guest.told() == [(2, PORT_OPEN, 0, b"")]


def test_a_peer_that_was_followed_by_another_is_told_as_two(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up(room=3 + 3 + 1 + 1 + 1)  # three ports are added, with names, one of them a console; one is left
    guest.terminals[1].arrive()
    assert guest.told() == [(1, PORT_OPEN, 1, b"")]
    for _ in range(50):
        guest.terminals[1].leave()
        guest.terminals[1].arrive()
    guest.room(CONTROL_RECEIVE, *[64] * 4)
    assert guest.told() == [(1, PORT_OPEN, 0, b""), (1, PORT_OPEN, 1, b"")]


def test_messages_wait_for_buffers_and_are_few_however_often_peers_come_and_go(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.tell(0, DEVICE_READY)
    for _ in range(20):
        for nr in (0, 1, 2):
            guest.tell(nr, PORT_READY)
            guest.terminals[nr].arrive()
            guest.terminals[nr].leave()
    assert len(guest.console.save().messages) <= 4 * 3
    guest.terminals[1].arrive()
    guest.room(CONTROL_RECEIVE, *[64] * 16)
    messages = guest.told()
    assert [message for message in messages if message[1] == PORT_ADD] == [(nr, PORT_ADD, 1, b"") for nr in range(3)]
    assert (1, PORT_OPEN, 1, b"") in messages
    assert (2, PORT_OPEN, 1, b"") not in messages, "its peer came and went unnoticed"


def test_a_second_driver_hears_everything_anew(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up(1)
    guest.terminals[1].arrive()
    guest.restart()
    guest.room(CONTROL_RECEIVE, *[64] * 16)
    guest.terminals[1].leave()
    guest.terminals[1].arrive()
    assert guest.told() == []
    guest.tell(0, DEVICE_READY)
    guest.tell(1, PORT_READY)
    assert guest.told()[3:] == [(1, PORT_NAME, 1, b"port1\0"), (1, PORT_OPEN, 1, b"")]
    guest.terminals[1].type(b"for a program")
    guest.room(receive_queue(1), 64)
    assert guest.heard(receive_queue(1)) == [], "no program of this driver has it open"


def test_a_driver_that_introduces_itself_again_says_nothing_twice(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up(1)
    guest.terminals[1].takes = 3
    guest.offer(b"0123456789", queue=transmit_queue(1))
    guest.kick(transmit_queue(1))
    guest.tell(0, DEVICE_READY)
    guest.terminals[1].allow(100)
    guest.loop.poll()
    assert guest.terminals[1].shown == b"0123456789"


def test_ports_come_and_go_while_a_driver_is_there(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up()
    guest.add(3)
    assert guest.told() == [(3, PORT_ADD, 1, b"")]
    guest.console.remove_port(3)
    assert guest.terminals[3].closed
    assert guest.told() == [(3, PORT_REMOVE, 1, b"")]
    guest.tell(3, PORT_READY)
    assert guest.told() == [], "the driver had not heard of the removal when it said that"
    with pytest.raises(DeviceError, match="no port 3"):
        guest.console.remove_port(3)


def test_a_port_that_went_before_anybody_heard_of_it_is_not_mentioned(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.tell(0, DEVICE_READY)
    guest.add(3)
    guest.console.remove_port(3)
    guest.room(CONTROL_RECEIVE, *[64] * 16)
    assert {nr for nr, *_ in guest.told()} == {0, 1, 2}


@pytest.mark.parametrize(
    ("nr", "console", "words"),
    [
        (0, False, "Port number 0 on virtio-serial devices reserved for virtconsole device."),
        (4, False, "virtio serial port nr 4 should be less than virtio serial's max_nr_ports 4"),
        (1, True, "Repetitive virtio serial port nr 1."),
    ],
)
def test_a_port_that_cannot_be_is_refused_in_stratovirts_words(make: Make, nr: int, console: bool, words: str) -> None:
    guest = make()
    with pytest.raises(DeviceError) as caught:
        guest.add(nr, console=console)
    assert str(caught.value) == words
    guest.terminals = {nr: terminal for nr, terminal in guest.terminals.items() if terminal.frontend}
    guest.terminals.setdefault(1, Peer()).closed = True


@pytest.mark.parametrize("max_ports", [0, MAX_PORTS + 1])
def test_a_device_has_1_to_31_ports(loop: DirectLoop, max_ports: int) -> None:
    with pytest.raises(ValueError, match=f"{max_ports} ports"):
        ConsoleDevice("console0", loop, max_ports)


def test_as_many_ports_as_there_can_be_work(make: Make) -> None:
    guest = make(MAX_PORTS, MAX_PORTS)
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, *[64] * 32)
    guest.tell(0, DEVICE_READY)
    assert len(guest.told()) == MAX_PORTS
    last = MAX_PORTS - 1
    guest.terminals[last].arrive()
    guest.offer(b"from the last", queue=transmit_queue(last))
    guest.kick(transmit_queue(last))
    assert guest.terminals[last].shown == b"from the last"


# Bytes


def test_input_waits_at_the_host_until_a_program_opens_the_port_and_again_when_it_closes(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up()
    terminal, queue = guest.terminals[1], receive_queue(1)
    guest.room(queue, *[8] * 4)
    terminal.type(b"early")
    guest.loop.poll()
    assert (guest.heard(queue), terminal.typed) == ([], b"early")
    guest.tell(1, PORT_OPEN)
    assert guest.heard(queue) == [b"early"]
    guest.tell(1, PORT_OPEN, 0)
    terminal.type(b"late")
    guest.loop.poll()
    assert (guest.heard(queue), terminal.typed) == ([], b"late")


def test_a_port_whose_peer_is_slow_holds_up_nobody_else(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up(1, 2)
    slow, quick = guest.terminals[1], guest.terminals[2]
    slow.takes = 3
    for nr in (1, 2):
        guest.offer(b"0123", b"45", queue=transmit_queue(nr))
        guest.offer(b"6789", queue=transmit_queue(nr))
        guest.kick(transmit_queue(nr))
    assert (slow.shown, quick.shown) == (b"012", b"0123456789")
    quick.type(b"typed")
    guest.room(receive_queue(2), 8)
    assert guest.heard(receive_queue(2)) == [b"typed"]
    assert guest.rings[transmit_queue(1)].collect() == []
    slow.allow(100)
    guest.loop.poll()
    assert slow.shown == b"0123456789"
    assert len(guest.rings[transmit_queue(1)].collect()) == 2


def test_a_driver_without_ports_has_the_first_one_only(make: Make) -> None:
    guest = make()
    guest.start(F_VERSION_1, size=32)
    guest.tell(0, DEVICE_READY)
    guest.room(CONTROL_RECEIVE, 64)
    guest.room(receive_queue(0), 16)
    assert guest.heard(CONTROL_RECEIVE) == []
    guest.terminals[0].type(b"hello")
    guest.loop.poll()
    assert guest.heard(receive_queue(0)) == [b"hello"], "it cannot say that a program has it open"
    guest.offer(b"not a port", queue=transmit_queue(1))
    guest.kick(transmit_queue(1))
    assert guest.terminals[1].shown == b""


# What a hostile driver says


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<IHH", 99, PORT_READY, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, PORT_OPEN, 1),
        struct.pack("<IHH", 1, PORT_ADD, 1),
        struct.pack("<IHH", 1, 0xFFFF, 0xFFFF),
        struct.pack("<IHH", 1, PORT_READY, 0),
        struct.pack("<IHH", 0, DEVICE_READY, 0),
        struct.pack("<IHH", 1, PORT_REMOVE, 1) + b"and more than a message" * 100,
    ],
)
def test_messages_without_meaning_have_no_effect(make: Make, message: bytes) -> None:
    guest = make()
    guest.start(size=32)
    guest.come_up()
    guest.offer(message, queue=CONTROL_TRANSMIT)
    guest.kick(CONTROL_TRANSMIT)
    assert guest.told() == []
    assert len(guest.rings[CONTROL_TRANSMIT].collect()) == 1, "it gets its buffer back"
    assert not guest.broken


def test_a_message_may_lie_in_pieces(make: Make) -> None:
    guest = make()
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, *[64] * 4)
    text = struct.pack("<IHH", 0, DEVICE_READY, 1)
    guest.offer(text[:1], text[1:7], text[7:], queue=CONTROL_TRANSMIT)
    guest.kick(CONTROL_TRANSMIT)
    assert len(guest.told()) == 3


@pytest.mark.parametrize("message", [(b"\1",), (b"1234567",), (64,)])
def test_a_message_that_is_none_breaks_the_device_until_a_reset(make: Make, message: tuple[bytes | int, ...]) -> None:
    guest = make()
    guest.start(size=32)
    guest.offer(*message, queue=CONTROL_TRANSMIT)
    guest.kick(CONTROL_TRANSMIT)
    assert guest.broken
    guest.terminals[1].arrive()
    guest.restart()
    guest.come_up(1)
    guest.offer(b"again", queue=transmit_queue(1))
    guest.kick(transmit_queue(1))
    assert guest.terminals[1].shown == b"again"


@pytest.mark.parametrize("room", [(7,), (b"readable",)])
def test_a_control_buffer_without_room_breaks_the_device(make: Make, room: tuple[int | bytes, ...]) -> None:
    guest = make()
    guest.start(size=32)
    guest.offer(*room, queue=CONTROL_RECEIVE)
    guest.kick(CONTROL_RECEIVE)
    guest.tell(0, DEVICE_READY)
    assert guest.broken


def test_a_name_is_cut_off_where_the_driver_has_no_room(make: Make) -> None:
    guest = make(1)
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, 8, 8, 8 + 3, 8)
    guest.tell(0, DEVICE_READY)
    guest.tell(0, PORT_READY)
    assert guest.told() == [(0, PORT_ADD, 1, b""), (0, CONSOLE_PORT, 1, b""), (0, PORT_NAME, 1, b"por"), (0, PORT_OPEN, 1, b"")]


def test_a_name_has_at_most_255_bytes(loop: DirectLoop, memory: GuestMemory, make: Make) -> None:
    guest = make(0)
    guest.console.add_port(0, "é" * 400, console=True)
    guest.start(size=32)
    guest.room(CONTROL_RECEIVE, *[1024] * 4)
    guest.tell(0, DEVICE_READY)
    guest.tell(0, PORT_READY)
    name = next(text for _, event, _, text in guest.told() if event == PORT_NAME)
    assert len(name) <= NAME_MAX + 1


# State


def restored(make: Make, old: Guest) -> Guest:
    """A second machine that goes on where `old`, which is paused, stands."""
    state = decode(encode(old.console.save()), ConsoleState, "console")
    new = make(len(old.console.ports))
    new.transport.restore(old.transport.save())
    new.console.restore(state)
    assert new.console.save() == state
    new.rings, new._next = old.rings, old._next
    new.transport.resume()
    new.loop.poll()
    return new


def test_messages_that_wait_survive_a_restore(make: Make) -> None:
    old = make()
    old.start(size=32)
    old.tell(0, DEVICE_READY)
    old.tell(1, PORT_READY)
    old.transport.pause()
    new = restored(make, old)
    new.room(CONTROL_RECEIVE, *[64] * 8)
    assert new.told() == [*[(nr, PORT_ADD, 1, b"") for nr in range(3)], (1, PORT_NAME, 1, b"port1\0")]


def test_a_restored_guest_hears_who_is_there_now(make: Make) -> None:
    old = make()
    old.start(size=32)
    old.come_up(1)
    old.terminals[1].arrive()
    old.told()
    old.transport.pause()
    new = restored(make, old)
    assert new.told() == [(1, PORT_OPEN, 0, b"")]
    new.terminals[1].arrive()
    assert new.told() == [(1, PORT_OPEN, 1, b"")]
    new.terminals[1].type(b"to the program that had it open")
    new.room(receive_queue(1), 64)
    assert new.heard(receive_queue(1)) == [b"to the program that had it open"]


# Anything at all

NUMBERS = st.sampled_from([0, 1, 2, 3, 99, 0xFFFF_FFFF])
MESSAGES = st.tuples(NUMBERS, st.integers(0, 9), st.integers(0, 2)).map(lambda words: struct.pack("<IHH", *words))
PORTS = st.integers(0, 3)
ACTIONS = st.one_of(
    st.tuples(st.just("message"), MESSAGES | st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("room"), st.tuples(st.integers(0, 9), st.integers(1, 80))),
    st.tuples(st.just("output"), st.tuples(st.integers(0, 9), st.binary(min_size=1, max_size=40))),
    st.tuples(st.just("type"), st.tuples(PORTS, st.binary(min_size=1, max_size=40))),
    st.tuples(st.just("arrive"), PORTS),
    st.tuples(st.just("leave"), PORTS),
    st.tuples(st.just("allow"), PORTS),
    st.tuples(st.just("add"), PORTS),
    st.tuples(st.just("remove"), PORTS),
    st.tuples(st.just("pause"), st.none()),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("come up"), st.none()),
)


def check_actions(actions: Iterable[tuple[str, object]]) -> None:
    """Let a driver, peers and an owner do what they like: nothing escapes, nothing grows, and a reset makes all of it work."""
    memory, loop = GuestMemory([(0, 1 << 20)]), new_loop()
    guest = Guest(memory, loop)
    for terminal in guest.terminals.values():
        terminal.takes = 10
    try:
        guest.start(size=32)
        for name, value in actions:
            act(guest, name, value)
            loop.poll()
            state = guest.console.save()
            assert len(state.messages) <= 6 * 4
            assert all(len(port.waiting) <= 4096 for port in state.ports)
        guest.restart()
        guest.come_up(*guest.console.ports)
        for nr, port in guest.console.ports.items():
            terminal = guest.terminals[nr]
            terminal.typed, port._waiting, terminal.takes = bytearray(b"in"), b"", 1 << 20
            terminal.input_wanted()
            guest.room(receive_queue(nr), 64)
            assert guest.heard(receive_queue(nr)) == [b"in"]
            terminal.allow(1)
            loop.poll()
            guest.offer(b"out", queue=transmit_queue(nr))
            guest.kick(transmit_queue(nr))
            assert terminal.shown.endswith(b"out")
        assert not guest.broken
    finally:
        guest.close()
        assert all(terminal.closed for terminal in guest.terminals.values())
        assert not watched(loop)
        loop.close()


def act(guest: Guest, name: str, value: object) -> None:
    if name == "message":
        guest.offer(value, queue=CONTROL_TRANSMIT)  # type: ignore[arg-type]
        guest.kick(CONTROL_TRANSMIT)
    elif name in ("room", "output"):
        queue, content = value  # type: ignore[misc]
        guest.offer(content, queue=queue)
        guest.kick(queue)
    elif name == "pause":
        guest.transport.pause()
        guest.loop.poll()
        guest.transport.resume()
    elif name == "restart":
        guest.restart()
    elif name == "come up":
        guest.come_up(*guest.console.ports)
    elif name == "add":
        if value not in guest.console.ports:
            guest.add(value)  # type: ignore[arg-type]
    elif name == "type":
        nr, data = value  # type: ignore[misc]
        if nr in guest.console.ports:
            guest.terminals[nr].type(data)
    elif value in guest.console.ports:
        if name == "remove":
            guest.console.remove_port(value)  # type: ignore[arg-type]
        elif name == "allow":
            guest.terminals[value].allow(10)  # type: ignore[index]
        else:
            getattr(guest.terminals[value], name)()  # type: ignore[index]


@given(st.lists(ACTIONS, max_size=40))
@settings(max_examples=300)
def test_nothing_that_a_driver_says_escapes_grows_or_outlives_a_reset(actions: list[tuple[str, object]]) -> None:
    check_actions(actions)


class Turning(IoThread):
    """A thread's loop that can be waited for as one without a thread is run."""

    def poll(self) -> int:
        for _ in range(3):  # the turn that is under way, and one that looks at everything
            self.run(lambda: None)
        return 0


def test_a_peer_that_comes_while_a_driver_is_forgotten_is_not_news_for_the_next(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Exception] = []
    loop = Turning("io", MonotonicClock(), lambda _, error: failed.append(error))
    loop.start()
    guest = Guest(memory, loop, 2)  # type: ignore[arg-type]
    guest.start(size=32)
    guest.come_up()
    forget = guest.console.control.reset

    def forget_and_see_one_come() -> None:
        forget()
        loop.call_soon(guest.terminals[1].arrive)
        loop.poll()

    monkeypatch.setattr(guest.console.control, "reset", forget_and_see_one_come)
    guest.status = 0
    loop.poll()
    assert guest.console.control.save() == ()
    assert guest.console.ports[1].host_open
    guest.close()
    loop.close()
    assert failed == []
