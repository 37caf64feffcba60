"""QMP: messages a second, round-trip latency and memory per client, each beside a peer measured in the same run.

    python bench/qmp.py [codec] [latency] [clients]

codec:    encode and decode one message, against qemu.qmp's Message, json of the standard library, and bare orjson
latency:  query-status over a unix socket, ours (asyncio, trio) against QEMU's own monitor, interleaved
clients:  memory of the server's process for each connected client

Needs the packages qmp-protocol and qmp-server, qemu.qmp for `codec`, trio for `latency` and qemu-system-x86_64 as its peer: see
bench/README.md.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROUNDS = 25
MESSAGES = 4_000
REQUESTS = 2_000
CLIENTS = 200

# The aims, beside which each result is printed
CODEC_AIM = 5.0  # times qemu.qmp, at least
P50_AIM = 1.5  # times QEMU's monitor, at most
P99_AIM = 1e-3  # seconds on an idle machine, at most

REPLY = {"running": True, "singlestep": False, "status": "running"}

SERVER = """\
import sys, anyio, time
from qmp_server import QmpServer, listen_unix
from qmp_protocol.commands.lifecycle import QueryStatus, StatusInfo
server = QmpServer(rate=0, max_clients=1000)
@server.handler(QueryStatus, concurrent=True)
def query_status(_, call):
    return StatusInfo(running=True, status="running")
anyio.run(server.serve, [listen_unix(sys.argv[1])], backend=sys.argv[2])
"""


def main(names: list[str]) -> None:
    """Run the parts that are named, or all."""
    parts: dict[str, Callable[[], None]] = {"codec": codec, "latency": latency, "clients": clients}
    for name in names or parts:
        print(f"== {name}")
        parts[name]()


# Messages a second ----------------------------------------------------------------------------------------------------


def codec() -> None:
    """Encode a message and decode the line again, MESSAGES times, in turns."""
    import orjson
    from qemu.qmp.message import Message

    from qmp_protocol import Execute, Framer, Return, encode
    from qmp_protocol.messages import decode_request, decode_response

    request = {"execute": "device_add", "arguments": {"id": "d", "driver": "virtio-blk-mmio", "addr": "0x1"}, "id": "a1"}
    reply = {"return": REPLY, "id": "a1"}
    ours_request = Execute(request["execute"], request["arguments"], "a1")  # type: ignore[arg-type]
    ours_reply = Return(REPLY, "a1")

    def ours(message: Any, decode: Callable[[Any], Any]) -> None:
        feed = Framer().feed
        for _ in range(MESSAGES):
            for frame in feed(encode(message)):
                decode(frame)

    def qemu(body: dict[str, Any]) -> None:
        for _ in range(MESSAGES):
            dict(Message(bytes(Message(body))))

    def standard(body: dict[str, Any]) -> None:
        for _ in range(MESSAGES):
            json.loads((json.dumps(body) + "\r\n").encode())

    def bare(body: dict[str, Any]) -> None:
        for _ in range(MESSAGES):
            orjson.loads(orjson.dumps(body))

    for kind, ours_message, decode, body in (
        ("command", ours_request, decode_request, request),
        ("reply", ours_reply, decode_response, reply),
    ):
        runs: dict[str, Callable[[], None]] = {
            "qmp-protocol": lambda m=ours_message, d=decode: ours(m, d),  # type: ignore[misc]
            "qemu.qmp": lambda b=body: qemu(b),  # type: ignore[misc]
            "json": lambda b=body: standard(b),  # type: ignore[misc]
            "bare orjson": lambda b=body: bare(b),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        best = {name: MESSAGES / min(taken) for name, taken in times.items()}
        middle = {name: MESSAGES / statistics.median(taken) for name, taken in times.items()}
        for name in runs:
            print(f"{kind:>8} {name:>13}: {middle[name]:>11,.0f} a second (best {best[name]:,.0f})")
        rate = middle["qmp-protocol"]
        ratios = [f"{rate / middle[name]:.2f} times {name}" for name in runs if name != "qmp-protocol"]
        print(f"{kind:>8} qmp-protocol is {', '.join(ratios)}")
        ratio = rate / middle["qemu.qmp"]
        print(f"{kind:>8} aim: at least {CODEC_AIM:g} times qemu.qmp: {_verdict(ratio >= CODEC_AIM)} ({ratio:.2f})")


# Round trips ----------------------------------------------------------------------------------------------------------


class Monitor:
    """A client that costs as little as a client can: the server is what is measured."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.line()
        self.run(b'{"execute":"qmp_capabilities"}\r\n')

    def line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            data += self.socket.recv(65536)
        return data

    def run(self, request: bytes) -> bytes:
        self.socket.sendall(request)
        return self.line()

    def trips(self, count: int) -> list[float]:
        """Seconds of each of `count` round trips."""
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            reply = self.run(b'{"execute":"query-status"}\r\n')
            taken.append(time.perf_counter() - start)
            assert b'"return"' in reply
        return taken


def latency() -> None:
    """REQUESTS round trips at a time, in turns."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        monitors: dict[str, Monitor] = {}
        for backend in ("asyncio", "trio"):
            path = Path(folder) / backend
            stack.enter_context(_running([sys.executable, "-c", SERVER, str(path), backend], path))
            monitors[f"ours ({backend})"] = Monitor(path)
        program = shutil.which("qemu-system-x86_64")
        if program:
            path = Path(folder) / "qemu"
            command = [program, "-machine", "none", "-display", "none", "-nodefaults", "-qmp", f"unix:{path},server=on,wait=off"]
            stack.enter_context(_running(command, path))
            monitors["QEMU"] = Monitor(path)
        taken: dict[str, list[float]] = {name: [] for name in monitors}
        for monitor in monitors.values():
            monitor.trips(200)
        for _ in range(ROUNDS):
            for name, monitor in monitors.items():
                taken[name] += monitor.trips(REQUESTS // ROUNDS)
        for name, times in taken.items():
            times.sort()
            p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
            ratio = ""
            if "QEMU" in taken and name != "QEMU":
                peer = sorted(taken["QEMU"])
                ratio = f"  ({p50 / peer[len(peer) // 2]:.2f} and {p99 / peer[len(peer) * 99 // 100]:.2f} times QEMU)"
            print(f"{name:>16}: p50 {p50 * 1e6:7.1f} us, p99 {p99 * 1e6:7.1f} us{ratio}")
            if ratio:
                within = p50 / peer[len(peer) // 2]
                print(f"{'':>16}  aim: p50 at most {P50_AIM:g} times QEMU: {_verdict(within <= P50_AIM)} ({within:.2f})")
                print(f"{'':>16}  aim: p99 at most {P99_AIM * 1e3:g} ms: {_verdict(p99 <= P99_AIM)} ({p99 * 1e3:.3f} ms)")
        if "QEMU" not in taken:
            print(f"aim: p50 at most {P50_AIM:g} times QEMU: not known, qemu-system-x86_64 is not here")


# Memory ---------------------------------------------------------------------------------------------------------------


def clients() -> None:
    """Memory (PSS) of the server's process with no client, with CLIENTS, and after they left."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        with _running([sys.executable, "-c", SERVER, str(path), "asyncio"], path) as process:
            Monitor(path).socket.close()
            time.sleep(0.3)
            before = _pss(process.pid)
            monitors = [Monitor(path) for _ in range(CLIENTS)]
            for monitor in monitors:
                monitor.trips(1)
            during = _pss(process.pid)
            for monitor in monitors:
                monitor.socket.close()
            time.sleep(0.5)
            after = _pss(process.pid)
    print(f"{before / 1024:.1f} MiB before, {(during - before) / CLIENTS:.1f} KiB a client, {after / 1024:.1f} MiB afterwards")


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def _pss(pid: int) -> int:
    """Proportional set size in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise RuntimeError("no Pss in smaps_rollup")


@contextmanager
def _running(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    try:
        while process.poll() is None:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    break
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
