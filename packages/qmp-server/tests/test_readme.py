"""The examples in the README files of qmp-server and qmp-protocol do what they say, with each other."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2]


def example(package: str, socket: Path) -> str:
    text = (PACKAGES / package / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code.replace("/tmp/example.qmp", str(socket))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_example_client_talks_to_the_example_server(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "s"
    program = example("qmp-server", path)
    if backend == "trio":
        assert ')])  # or backend="trio"' in program
        program = program.replace(')])  # or backend="trio"', ')], backend="trio")')
    server = subprocess.Popen([sys.executable, "-c", program])
    try:
        for _ in range(6000):
            if path.exists() or server.poll() is not None:
                break
            threading.Event().wait(0.01)
        done = subprocess.run([sys.executable, "-c", example("qmp-protocol", path)], capture_output=True, text=True, check=True)
        assert "'status': 'running'" in done.stdout
        end = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        end += "s.sendall(b'{\"execute\":\"quit\"}'); print(b''.join(iter(lambda: s.recv(4096), b'')))"
        done = subprocess.run([sys.executable, "-c", end, str(path)], capture_output=True, text=True, check=True)
        assert "host-qmp-quit" in done.stdout
        assert server.wait(60) == 0
        assert not path.exists()
    finally:
        server.kill()
        server.wait()
