"""A process that may not open many files: what it says when they do not suffice, and what clients can do to it when they do."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pystratovirt.errors import VmError, blame, shortage
from vm_process import LIMIT, Client, Vm

TOO_MANY = os.strerror(errno.EMFILE)
MACHINES = {
    "a disk": "-drive file={0}/disk,id=d,direct=off -device virtio-blk-device,drive=d,id=d"
    " -serial socket,path={0}/s,server,nowait",
    "many devices": "-D {1}/log -name g -object iothread,id=io -chardev file,id=f,path={1}/f -chardev pty,id=pty"
    " -device virtio-serial-device,id=p -device virtconsole,chardev=f,id=c -device virtconsole,chardev=pty,id=c2"
    " -device virtio-balloon-device,id=b -device virtio-vsock-device,id=v,guest-cid=7,path={0}/v"
    " -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r,id=r"
    " -chardev socket,path={0}/m,id=m,server,nowait -mon chardev=m,id=mon,mode=control -mem-prealloc -smp 2",
}


@pytest.mark.parametrize("options", MACHINES.values(), ids=MACHINES)
def test_a_start_with_too_few_descriptors_is_1_with_one_line_and_leaves_nothing(tmp_path: Path, options: str) -> None:
    """Each number from one that the interpreter itself can live with, up to one that is enough for this machine."""
    folder, output = tmp_path / "here", tmp_path / "output"
    folder.mkdir()
    output.mkdir()
    (folder / "disk").write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "test"))
        listener.listen(100)
        command = [sys.executable, "-m", "pystratovirt", "-machine", "microvm", "-m", "128", "-daemonize"]
        command += ["-pidfile", str(folder / "pid"), "-mod-test", str(folder / "test"), "-qmp", f"unix:{folder}/q,server,nowait"]
        command += options.format(folder, output).split()
        for most in range(10, 100):
            done = _run(command, most)
            if not done.returncode:
                break
            assert (done.returncode, done.stdout) == (1, ""), (most, done.stderr)
            assert re.fullmatch(f"stratovirt: [^\n]*: {TOO_MANY}\n", done.stderr), (most, done.stderr)
            assert "[Errno" not in done.stderr
            assert ".py" not in done.stderr
            assert {path.name for path in folder.iterdir()} == {"disk", "test"}, most
        assert most >= 20
        # What is enough for the start is enough for a guest, and for who looks after it.
        process = os.pidfd_open(int((folder / "pid").read_text()))
        with Client(str(folder / "q")) as client:
            assert client.run("query-status")["return"]["running"] is True
        signal.pidfd_send_signal(process, signal.SIGTERM)
        assert select.select([process], [], [], LIMIT)[0]
        os.close(process)
        assert {path.name for path in folder.iterdir()} == {"disk", "test"}


def _run(command: list[str], most: int) -> subprocess.CompletedProcess[str]:
    """Run a command that may have `most` descriptors."""
    return subprocess.run(
        ["sh", "-c", f'ulimit -n {most} && exec "$@"', "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "STRATOVIRT_LOG_LEVEL"},
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, TOO_MANY, "/src/module.py"), TOO_MANY),
        (ImportError(f"/lib/termios.so: cannot open shared object file: {TOO_MANY}"), TOO_MANY),
        (MemoryError(), "Cannot allocate memory"),
        (OSError(errno.ENOENT, "No such file or directory", "/disk"), ""),
        (ModuleNotFoundError("No module named 'x'"), ""),
        (ValueError(TOO_MANY), ""),
    ],
)
def test_a_shortage_is_told_from_other_failures(error: Exception, words: str) -> None:
    assert shortage(error) == words


def test_a_shortage_is_blamed_on_an_option_without_the_place_in_our_code() -> None:
    with pytest.raises(VmError, match=f"^-netdev: {TOO_MANY}$"), blame("-netdev"):
        raise OSError(errno.EMFILE, TOO_MANY, "/src/module.py")
    with pytest.raises(VmError, match=f"^out of resources: {TOO_MANY}$"), blame(""):
        raise ImportError(f"/lib/termios.so: cannot open shared object file: {TOO_MANY}")
    with pytest.raises(ModuleNotFoundError), blame("-netdev"):
        raise ModuleNotFoundError("No module named 'x'")


def test_descriptors_that_a_client_passes_leave_enough_for_everybody_else(tmp_path: Path) -> None:
    with Vm(tmp_path) as vm, Client(vm.unix) as client:
        resource.prlimit(vm.process.pid, resource.RLIMIT_NOFILE, (80, 80))
        reader, writer = os.pipe()
        refused = ""
        passed = 0
        while not refused:
            client.send(json.dumps({"execute": "getfd", "arguments": {"fdname": str(passed)}}), [writer])
            refused = client.read().get("error", {}).get("desc", "")
            passed += not refused
        assert (passed, refused) == (20, "at most 20 descriptors can wait for a device")
        with Client(vm.unix) as other:
            assert other.run("query-status")["return"]["running"] is True
            drive = {"node-name": "d", "file": {"driver": "file", "filename": str(tmp_path / "disk")}, "cache": {"direct": False}}
            (tmp_path / "disk").write_bytes(bytes(1 << 20))
            assert other.run("blockdev-add", drive) == {"return": {}}
        os.close(reader)
        os.close(writer)
