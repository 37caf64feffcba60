"""Fixtures of the whole-VM tests. They need a /dev/kvm that runs Linux: `tox -e lab` gives them one on any machine.

Each test starts VMMs with `start`, and leaves nothing behind: afterwards there is no process of theirs, no socket of one
that ended by itself, no new temporary file, and no complaint of KVM in the kernel's log. Consoles, logs,
command lines, and where the threads and vCPUs were, are kept of a failed test in $LAB_OUT (or lab-results/), in a folder with the
test's name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from lab import guests, suite
from lab.idle import idle_machine
from lab.probe import probe
from lab.vmm import Failure, Qmp, QmpError, Vmm, end_session, session_processes

_HERE = Path(__file__).parent
# Where programs put temporary files. In the lab a view of what was written there: in /tmp itself, files that others make
# outside show through.
_WRITTEN = "/run/lab/written" if "LAB" in os.environ else ""
_WATCHED = (f"{_WRITTEN}/tmp", f"{_WRITTEN}/var/tmp", "/dev/shm", "/run")
# What is known to be harmless: kvm-amd asks the emulated CPU for a performance counter that it does not have.
_HARMLESS = re.compile(r"(Unhandled|ignored) (WRMSR|wrmsr).*0xc0010007")
_COMPLAINT = re.compile(r"\bkvm\b.*|SVM:.*|BUG:.*|Oops.*|Call Trace.*|Out of memory.*|general protection.*", re.IGNORECASE)
# What a stock kernel does at a start that none of these tests is about: a fifth of its time, where all of it is emulated.
_REGISTERS = ("rip", "rflags", "rsp", "cs", "cr0", "cr3", "rax", "rdi", "rsi", "tsc", "tsc_deadline")
_REGISTERS += ("apic:320", "apic:380", "apic:390", "apic:3e0")  # its timer: how, from which count, at which, divided by what
_FASTER = "mitigations=off nokaslr cryptomgr.notests audit=0 apparmor=0"
_report = pytest.StashKey[pytest.TestReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `lab tests` needs: several lab hosts, and a second run."""
    parser.addoption(
        "--claims", metavar="DIR", type=Path, help="run what no other run has taken, by a folder in DIR for each test"
    )
    parser.addoption("--passed-already", metavar="FILE", type=Path, help="leave out the tests whose ids are in FILE")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is in this folder."""
    if _HERE in item.path.parents:
        item.add_marker(pytest.mark.lab)


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what need not run again."""
    if file := config.getoption("--passed-already"):
        passed = set(file.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run what nobody else has taken. A test is taken while the one before it runs, which has to know what comes next."""
    claims = session.config.getoption("--claims")
    if claims is None or session.testsfailed or session.config.option.collectonly:
        return None
    ours = (item for number, item in enumerate(session.items) if _claim(claims / str(number)))
    item = next(ours, None)
    while item is not None:
        following = next(ours, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def _claim(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


class _Outcomes:
    """Writes down what is known, so that the end of the lab host does not take it along.

    A plugin of its own: the hooks of this file are not asked about the tests of packages, which run in the lab too.
    """

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (out := os.environ.get("LAB_OUT")) and (report.when == "teardown" or not report.passed):
            with Path(out, suite.OUTCOMES).open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    """Listen to every test."""
    config.pluginmanager.register(_Outcomes())


def pytest_sessionstart(session: pytest.Session) -> None:
    """What an earlier run kept is not this run's."""
    for folder in Path(os.environ.get("LAB_OUT", "lab-results")).glob("test_*/"):
        shutil.rmtree(folder)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Others may have taken everything; whether there was any test is for who shares them out."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--claims"):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI a skipped lab test is a failed one: the lab is there so that nothing has to be skipped."""
    report: pytest.TestReport = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    if report.failed or call.when == "call":
        item.stash[_report] = report
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for a whole file."""
    report: pytest.CollectReport = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def usable_kvm() -> None:
    """These tests run where guests run; elsewhere they are skipped, with the way to run them."""
    answer = probe()
    if not answer.native:
        pytest.skip(f"{answer.reason}; use 'tox -e lab'")


@pytest.fixture(scope="session", autouse=True)
def one_idle_machine(usable_kvm: None) -> Iterator[None]:
    """Keep one idle VM for as long as the tests run."""
    with idle_machine():
        yield


@pytest.fixture(scope="session")
def cloud_kernel() -> guests.Kernel:
    """The stock cloud kernel: finds CPUs and disks through ACPI only."""
    return guests.kernel("cloud")


@pytest.fixture(scope="session")
def generic_kernel() -> guests.Kernel:
    """The stock generic kernel: reads MP tables too."""
    return guests.kernel("generic")


@pytest.fixture(scope="session")
def initrd(cloud_kernel: guests.Kernel) -> Path:
    """An initrd for the cloud kernel that mounts root= and goes on there."""
    return guests.initrd(cloud_kernel)


@pytest.fixture(scope="session")
def generic_initrd(generic_kernel: guests.Kernel) -> Path:
    """The same for the generic kernel."""
    return guests.initrd(generic_kernel)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for one test, with a path that is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def rootfs(folder: Path) -> Path:
    """A root image of this test's own, to write to."""
    return guests.copy_image(guests.rootfs(), folder / "rootfs.ext4")


@pytest.fixture(scope="session")
def direct_folder() -> Iterator[Path]:
    """A folder whose files can be opened with O_DIRECT. The lab's own files lie in memory, which cannot."""
    path = Path(tempfile.mkdtemp(prefix="direct-", dir="/tmp"))
    probe_file = path / "probe"
    probe_file.touch()
    try:
        os.close(os.open(probe_file, os.O_RDWR | os.O_DIRECT))
        mounted = False
    except OSError:
        mounted = True
        image = path.with_suffix(".img")
        subprocess.run(["modprobe", "loop"], check=True)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image), "4G"], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    yield path
    if mounted:
        subprocess.run(["umount", str(path)], check=True)
        image.unlink()
    shutil.rmtree(path)


@pytest.fixture
def start(request: pytest.FixtureRequest, folder: Path) -> Iterator[Callable[..., Vmm]]:
    """Start the VMM with these arguments: start("-machine", "microvm", …, name="second") -> Vmm.

    Kernels are told to do without some work, but for tests marked `plain_command_line`.
    $STRATOVIRT names another program than the one beside this Python, to run the same test with a peer.
    """
    program = os.environ.get("STRATOVIRT") or str(Path(sys.executable).with_name("stratovirt"))
    running: list[Vmm] = []

    plain = request.node.get_closest_marker("plain_command_line")

    def starter(*arguments: object, name: str = "", descriptors: Sequence[int] = ()) -> Vmm:
        words = list(map(str, arguments))
        if "-append" in words and not plain:
            words[words.index("-append") + 1] += f" {_FASTER}"
        vmm = Vmm([program, *words], folder, name or f"vmm{len(running)}", descriptors=descriptors)
        running.append(vmm)
        return vmm

    yield starter
    if _failed(request.node):
        for vmm in running:
            _look(vmm, folder)
    for vmm in running:
        vmm.kill()
    left = [entry for vmm in running for entry in session_processes(vmm.pid)]
    for vmm in running:
        end_session(vmm.pid)
    if _failed(request.node):
        _keep(request.node, running)
    assert not left, f"processes left behind: {left}"
    if not any(vmm.killed for vmm in running):  # kill -9 gives no chance to remove a socket
        sockets = [path.name for path in folder.iterdir() if path.is_socket()]
        assert not sockets, f"sockets left behind: {sockets}"


@pytest.fixture
def qmp(folder: Path) -> Iterator[Callable[[], Qmp]]:
    """Connect to this test's QMP socket, folder/"qmp.sock": qmp() -> Qmp. Closed at the end."""
    connections: list[Qmp] = []

    def connect() -> Qmp:
        connections.append(Qmp(folder / "qmp.sock"))
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()


@pytest.fixture(autouse=True)
def nothing_left_in_temporary_folders() -> Iterator[None]:
    """No new file in the places where programs put temporary ones."""
    before = _temporary_files()
    yield
    left = _temporary_files() - before
    assert not left, f"left behind: {sorted(left)}"


@pytest.fixture(autouse=True)
def no_complaint_in_the_kernel_log(usable_kvm: None) -> Iterator[None]:
    """The host's kernel log shows no KVM error, no warning and no crash from this test."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield
        complaints = [line for line in _kernel_messages(log) if _COMPLAINT.search(line) and not _HARMLESS.search(line)]
    finally:
        os.close(log)
    assert not complaints, "the kernel complained:\n" + "\n".join(complaints)


def _kernel_messages(log: int) -> Iterator[str]:
    """New warnings and worse, one a record (Linux, Documentation/ABI/testing/dev-kmsg)."""
    while True:
        try:
            record = os.read(log, 8192).decode(errors="replace")
        except BlockingIOError:
            return
        except BrokenPipeError:
            continue  # the ring went round; the next read gives the oldest that is left
        head, _, text = record.partition(";")
        if int(head.split(",")[0]) & 7 <= 4:  # LOG_WARNING
            yield text.splitlines()[0]


def _temporary_files() -> set[str]:
    # Folders of fixtures with a longer life, and of pytest itself, are not a test's leavings.
    ours = re.compile(r"/(pytest-of-.*|direct-.*)$")
    folders = [Path(folder) for folder in _WATCHED if Path(folder).is_dir()]
    # A character device there is the mark of a deleted file (Linux, Documentation/filesystems/overlayfs.rst).
    found = (path for folder in folders for path in folder.iterdir())
    return {str(path) for path in found if not ours.search(str(path)) and not path.is_char_device()}


def _failed(item: pytest.Item) -> bool:
    return item.stash.get(_report, None) is not None and item.stash[_report].failed


def _look(vmm: Vmm, folder: Path) -> None:
    """Write down what a machine does that a test waits for: its threads, and where its vCPUs are, twice."""
    if vmm.process.poll() is not None:
        return
    lines = []
    for task in sorted(Path(f"/proc/{vmm.pid}/task").iterdir()):
        with suppress(OSError):
            stat, wchan, call = ((task / name).read_text().strip() for name in ("stat", "wchan", "syscall"))
            lines.append(f"{stat.partition(')')[0]}) {' '.join(stat.rpartition(')')[2].split()[:1])} {wchan} {call}")
    try:
        with Qmp(folder / "qmp.sock", timeout=5.0) as client:
            lines.append(str(client.execute("query-status", timeout=5.0)))
            cpus = len(client.execute("query-cpus", timeout=5.0))
            for _ in range(2):
                for cpu in range(cpus):
                    values = [
                        f"{name}={client.execute('query-vcpu-reg', {'addr': name, 'vcpu': cpu}, timeout=20.0)}"
                        for name in _REGISTERS
                    ]
                    lines.append(f"vCPU {cpu}: {' '.join(values)}")
            lines.append(str(client.execute("human-monitor-command", {"command-line": "info stats"}, timeout=5.0)))
    except (Failure, QmpError, OSError) as error:
        lines.append(f"QMP: {error}")
    vmm.log.with_suffix(".state").write_text("\n".join(lines) + "\n")


def _keep(item: pytest.Item, vmms: list[Vmm]) -> None:
    target = Path(os.environ.get("LAB_OUT", "lab-results")) / re.sub(r"[^\w.-]+", "_", item.name)
    target.mkdir(parents=True, exist_ok=True)
    for vmm in vmms:
        shutil.copy(vmm.console, target)
        shutil.copy(vmm.log, target)
        if (state := vmm.log.with_suffix(".state")).exists():
            shutil.copy(state, target)
        (target / f"{vmm.log.stem}.command").write_text(" ".join(vmm.command) + "\n")
