"""Networks behind a stream socket, and the process at its other end."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net_cable import MAC, Net, frame
from virtio_devices.device import F_EVENT_IDX, DeviceError
from virtio_devices.mmio import CONFIG_CHANGE
from virtio_devices.mmio_registers import SIZE
from virtio_devices.net import passt
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import F_CTRL_GUEST_OFFLOADS, HEADER, OFFLOADS
from virtio_devices.net.passt import PasstBackend
from virtio_devices.net.stream import FRAME_MAX, StreamBackend
from virtio_driver import descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory


def packed(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(one)) + one for one in frames)


class Pipe:
    """A stream back end and its far end."""

    def __init__(self, room: int = 1 << 20) -> None:
        near, self.far = socket.socketpair()
        self.backend = StreamBackend("stream", near)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        self.far.setblocking(False)
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def received(self) -> bytes:
        data = b""
        try:
            while part := self.far.recv(1 << 20):
                data += part
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        self.backend.close()
        self.far.close()


Make = Callable[..., Net]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[Net] = []

    def make(pipe: Pipe, queue_size: int = 256) -> Net:
        said: list[str] = []
        device = NetDevice("net0", [loop], memory, mac=MAC, backend=pipe.backend, queue_size=queue_size, report=said.append)
        made.append(Net(device, memory, loop))
        made[-1].said = said  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for driver in made:
        driver.close()
    assert not watched(loop)


def test_nothing_is_left_unfinished(make: Make, pipe: Pipe) -> None:
    assert not make(pipe).offered() & OFFLOADS


def test_frames_are_sent_behind_their_length_and_without_the_header(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up()
    frames = [frame(60), frame(1514), frame(9000)]
    assert len(driver.say(*frames)) == 3
    assert pipe.received() == packed(*frames)


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 40])
def test_a_frame_may_be_scattered_anyhow(make: Make, pipe: Pipe, cut: int) -> None:
    driver = make(pipe).up()
    whole = bytes(HEADER) + frame(60)
    driver.request(whole[:cut], whole[cut:50], whole[50:], queue=1)
    assert pipe.received() == packed(frame(60))


@pytest.mark.parametrize("size", [1, 12, 25, HEADER + FRAME_MAX + 1])
def test_what_is_no_frame_is_not_sent(make: Make, pipe: Pipe, size: int) -> None:
    driver = make(pipe).up()
    driver.request(bytes(size), queue=1)
    driver.say(frame())
    assert pipe.received() == packed(frame())
    assert driver.device.statistics().tx_dropped == 1


@pytest.mark.parametrize("pieces", [1020, 1021, 1022, 1023])
def test_frames_of_many_pieces_go_out_in_as_many_system_calls_as_it_takes(make: Make, pipe: Pipe, pieces: int) -> None:
    driver = make(pipe, queue_size=2048).up(size=2048)
    first, second = frame(60), frame(1200)[: pieces + 20]
    driver.offer(bytes(HEADER) + first, queue=1)
    driver.offer(bytes(HEADER) + second[:21], *(second[at : at + 1] for at in range(21, pieces + 20)), queue=1)
    driver.kick(1)
    assert pipe.received() == packed(first, second)
    assert len(driver.rings[1].collect()) == 2


def test_frames_wait_while_the_stream_is_full_and_none_is_lost(make: Make) -> None:
    pipe = Pipe(room=4096)
    driver = make(pipe).up(size=64)
    frames = [frame(1000 + number, fill=number) for number in range(30)]
    driver.say(*frames[:20])
    driver.transport.pause()
    driver.transport.resume()
    driver.say(*frames[20:])
    got = b""
    for _ in range(60):
        got += pipe.received()
        driver.loop.poll()
    assert got + pipe.received() == packed(*frames)
    pipe.close()


def test_frames_arrive_however_the_stream_is_cut(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up(size=64)
    driver.room(*[1600] * 16)
    frames = [frame(60 + 300 * number, fill=number) for number in range(5)]
    data = packed(*frames)
    for at in range(0, len(data), 37):
        pipe.far.send(data[at : at + 37])
        driver.loop.poll()
    assert driver.heard() == frames


def test_a_large_frame_lies_in_several_buffers(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up(size=64)
    driver.room(*[4096] * 20)
    pipe.far.send(packed(frame(60_000), frame(60)))
    driver.loop.poll()
    assert driver.heard() == [frame(60_000), frame(60)]


@pytest.mark.parametrize("event_idx", [True, False])
def test_without_buffers_frames_wait_and_nothing_spins(make: Make, pipe: Pipe, event_idx: bool) -> None:
    driver = make(pipe).up(without=0 if event_idx else F_EVENT_IDX)
    frames = [frame(60 + number) for number in range(5)]
    pipe.far.send(packed(*frames))
    assert driver.loop.poll() <= 3
    driver.room(1600, 1600)
    assert driver.heard() == frames[:2]
    assert driver.loop.poll() == 0
    driver.transport.pause()
    driver.transport.resume()
    driver.loop.poll()
    driver.room(1600, 1600, 1600)
    assert driver.heard() == frames[2:]


def test_more_frames_than_one_turn_takes_arrive_without_further_events(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up(size=128)
    driver.room(*[128] * 100)
    pipe.far.send(packed(*[frame(60)] * 100))
    driver.loop.poll()
    assert driver.heard() == [frame(60)] * 100


def test_a_frame_that_no_ring_of_the_driver_can_hold_is_dropped_and_the_next_ones_arrive(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up(size=8)
    driver.room(*[1600] * 8)
    pipe.far.sendall(packed(frame(60_000), frame(60)))
    driver.loop.poll()
    assert driver.heard() == [frame(60)]
    assert driver.device.statistics().rx_dropped == 1


def test_without_mergeable_buffers_what_does_not_fit_is_dropped(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up(mergeable=False)
    driver.room(1600, 1600)
    pipe.far.send(packed(frame(9000), b"short", frame(60)))
    driver.loop.poll()
    assert driver.heard() == [frame(60)]
    assert driver.device.statistics().rx_dropped == 2


@pytest.mark.parametrize("end", ["close", "nonsense"])
def test_when_the_stream_ends_the_link_goes_down_and_the_device_lives(make: Make, pipe: Pipe, end: str) -> None:
    driver = make(pipe).up()
    driver.room(1600)
    if end == "close":
        pipe.far.close()
    else:
        pipe.far.send(b"\xff" * 100)
    driver.loop.poll()
    assert driver.link == 0
    assert len(driver.said) == 1  # type: ignore[attr-defined]
    assert len(driver.say(frame(), frame())) == 2
    assert driver.loop.poll() == 0
    assert not driver.broken


@pytest.mark.parametrize("reads", [True, False], ids=["and looks first", "and does not look"])
@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_a_driver_that_comes_after_the_end_of_the_stream_finds_the_link_down(
    make: Make, pipe: Pipe, end: str, reads: bool
) -> None:
    driver = make(pipe)
    assert driver.link == 1
    if end == "close":
        pipe.far.close()
    else:
        pipe.far.shutdown(socket.SHUT_WR)
    if reads:
        assert driver.link == 0
    for _ in range(2):  # and the next one
        driver.up()
        assert driver.link == 0
        assert len(driver.say(frame(), frame())) == 2
        driver.room(1600)
        assert driver.loop.poll() == 0
        assert not driver.broken
        driver.status = 0
        assert driver.link == 0
    assert driver.said == ["net0: the network is gone: the other side has gone"]  # type: ignore[attr-defined]


def test_a_stream_that_ends_between_two_drivers_is_noticed_by_the_next(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up()
    assert driver.link == 1
    driver.status = 0
    assert driver.link == 1
    pipe.far.close()
    assert driver.link == 0
    assert driver.up().link == 0


def test_a_driver_that_reads_memory_hears_of_a_stream_that_has_ended_when_it_is_ready(make: Make, pipe: Pipe) -> None:
    driver = make(pipe)
    registers = memoryview(bytearray(SIZE))
    driver.transport.mirror(registers)
    pipe.far.close()
    driver.up()
    assert (registers[0x106], registers[0x060] & CONFIG_CHANGE, driver.line.edges) == (0, CONFIG_CHANGE, 1)


def test_a_stream_that_has_ended_already_is_put_in_without_a_link(memory: GuestMemory, loop: DirectLoop, pipe: Pipe) -> None:
    said: list[str] = []
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, report=said.append), memory, loop)
    driver.up(without=F_EVENT_IDX | OFFLOADS | F_CTRL_GUEST_OFFLOADS)
    pipe.far.close()
    driver.device.attach(pipe.backend)
    assert driver.link == 0
    assert said == ["net0: the network is gone: the other side has gone"]
    driver.close()


def test_a_driver_that_sends_after_the_end_of_the_stream_gets_everything_back(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up()
    pipe.far.close()
    for _ in range(3):
        driver.offer(bytes(HEADER), frame(), queue=1)
    driver.kick(1)
    assert len(driver.rings[1].collect()) == 3
    assert driver.link == 0


def test_buffers_that_may_be_merged_need_not_hold_more_than_a_header(make: Make, pipe: Pipe) -> None:
    driver = make(pipe).up()
    driver.room(12, 13, 20, 64, 12, 1600)
    pipe.far.send(packed(frame(60), frame(61)))
    driver.loop.poll()
    assert driver.heard() == [frame(60), frame(61)]


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_that_wait_for_a_stream_come_back_when_it_ends(make: Make, event_idx: bool) -> None:
    """The driver was told not to kick until they are gone."""
    pipe = Pipe(room=4096)
    driver = make(pipe).up(size=64, without=0 if event_idx else F_EVENT_IDX)
    done = len(driver.say(*[frame(1500)] * 32))
    done += len(driver.say(*[frame(1500)] * 32))
    assert done < 64
    pipe.far.close()
    driver.loop.poll()
    assert done + len(driver.rings[1].collect()) == 64
    assert driver.link == 0
    pipe.close()


@given(
    st.lists(st.binary(min_size=14, max_size=3000), max_size=12),
    st.lists(st.integers(1, 4000), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_split_of_the_stream_gives_the_same_frames(frames: list[bytes], cuts: list[int], mergeable: bool) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    loop = new_loop()
    pipe = Pipe()
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=pipe.backend), memory, loop)
    driver.up(mergeable=mergeable, size=64)
    driver.room(*[3100] * 12)
    data = packed(*frames)
    at = number = 0
    while at < len(data):
        step = cuts[number % len(cuts)]
        pipe.far.send(data[at : at + step])
        loop.poll()
        at, number = at + step, number + 1
    assert driver.heard() == frames
    driver.close()
    pipe.close()
    loop.close()
    memory.close()


# The process

_PROGRAM = """#!{python} -S
import os, socket, sys, time
stream = socket.socket(fileno=3)
def read(count):
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
{body}
"""
_ANSWERS = """
while True:
    length = read(4)
    frame = read(int.from_bytes(length, "big"))
    stream.sendall(length + frame)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Make a program in passt's place: program(what it does) -> path."""

    def program(body: str) -> str:
        path = tmp_path / "peer"
        path.write_text(_PROGRAM.format(python=sys.executable, body=body))
        path.chmod(0o755)
        return str(path)

    return program


def test_the_process_is_ready_when_it_is_there_and_ends_with_the_back_end(program: Callable[[str], str]) -> None:
    before = descriptors(settle=True)
    backend = PasstBackend("net0", program(_ANSWERS))
    pid = backend._pid
    assert backend.alive()
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    backend.close()
    backend.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert descriptors() == before


def test_the_process_has_no_descriptor_but_its_own(program: Callable[[str], str]) -> None:
    """One that was left open for us, a tap for instance, is inheritable and none of its business."""
    left = [os.open("/etc/hostname", os.O_RDONLY), os.open("/", os.O_RDONLY)]
    for fd in left:
        os.set_inheritable(fd, True)
    try:
        backend = PasstBackend("net0", program(_ANSWERS))
        # The program itself is a script, which its interpreter reads.
        links = {str(path.readlink()) for path in Path(f"/proc/{backend._pid}/fd").iterdir() if int(path.name) > 3}
        assert links <= {str(Path(program(_ANSWERS)).resolve())}
        assert all(os.get_inheritable(fd) for fd in left)
        backend.close()
    finally:
        for fd in left:
            os.close(fd)


def test_a_process_that_does_not_end_is_ended(program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "_END_LIMIT", 0.0)
    backend = PasstBackend("net0", program("length = read(4); stream.sendall(length + read(42)); time.sleep(1000)"))
    pid = backend._pid
    backend.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_ends_with_the_back_end_when_no_descriptor_is_left_to_watch_it(
    program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    before = descriptors(settle=True)
    backend = PasstBackend("net0", program(_ANSWERS))
    monkeypatch.setattr(os, "pidfd_open", none_left)
    pid = backend._pid
    backend.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("print(\"Don't run as root\", file=sys.stderr); sys.exit('no interface here')", "status 1: no interface here"),
        ("os.kill(os.getpid(), 9)", "ended with signal 9"),
        ("stream.close(); os.close(3) if 0 else None; sys.exit(3)", "ended with status 3"),
    ],
)
def test_a_process_that_fails_is_quoted(program: Callable[[str], str], body: str, complaint: str) -> None:
    before = descriptors(settle=True)
    with pytest.raises(DeviceError, match=f"net0: passt .*{complaint}"):
        PasstBackend("net0", program(body))
    assert descriptors() == before


def test_a_process_that_says_nothing_is_given_up(program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "START_LIMIT", 0.0)
    monkeypatch.setattr(passt, "_END_LIMIT", 0.0)
    with pytest.raises(DeviceError, match="does not answer within"):
        PasstBackend("net0", program("time.sleep(1000)"))


@pytest.mark.parametrize(("name", "complaint"), [("nonesuch-program", "not found"), ("/etc/passwd", "Permission denied")])
def test_a_program_that_cannot_be_run_is_named(name: str, complaint: str) -> None:
    before = descriptors(settle=True)
    with pytest.raises(DeviceError, match=complaint):
        PasstBackend("net0", name)
    assert descriptors() == before


def test_the_last_words_of_a_process_are_in_the_report(
    make: Make, program: Callable[[str], str], memory: GuestMemory, loop: DirectLoop
) -> None:
    body = "length = read(4); stream.sendall(length + read(42)); read(4); sys.exit('the host is on fire')"
    backend = PasstBackend("net0", program(body))
    said: list[str] = []
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=backend, report=said.append), memory, loop).up()
    driver.say(frame())
    driver.room(1600)
    if backend._pid > 0:  # the loop has not heard of it yet
        os.waitid(os.P_PID, backend._pid, os.WEXITED | os.WNOWAIT)
    loop.poll()
    assert driver.link == 0
    assert said == ["net0: the network is gone: passt ended with status 1: the host is on fire"]
    driver.close()
    backend.close()


def test_the_last_words_of_a_process_that_ended_before_the_driver_came_are_in_the_report(
    program: Callable[[str], str], memory: GuestMemory, loop: DirectLoop
) -> None:
    body = "length = read(4); stream.sendall(length + read(42)); sys.exit('the host is on fire')"
    backend = PasstBackend("net0", program(body))
    os.waitid(os.P_PID, backend._pid, os.WEXITED | os.WNOWAIT)
    said: list[str] = []
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=backend, report=said.append), memory, loop)
    assert driver.link == 0
    assert driver.up().link == 0
    assert said == ["net0: the network is gone: passt ended with status 1: the host is on fire"]
    assert backend.obituary() == "passt ended with status 1: the host is on fire", "as often as somebody asks"
    driver.close()
    backend.close()
