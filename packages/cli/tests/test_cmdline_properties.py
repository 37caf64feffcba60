"""Properties of the command line parser: total, single-line answers, and nothing lost between text and configuration."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pystratovirt.cmdline import CommandLineError, Config, Information, parse
from pystratovirt.cmdline.backends import CHARDEVS, OBJECTS, Drive, Mon, Qmp
from pystratovirt.cmdline.declare import Parameters
from pystratovirt.cmdline.drivers import DRIVERS
from pystratovirt.cmdline.machine import Accel, Cpu, Machine, MemorySize, Smp
from pystratovirt.cmdline.options import LATER, OPTIONS
from pystratovirt.cmdline.render import render
from pystratovirt.cmdline.values import MiB

SCHEMAS: list[type[Parameters]] = [
    *(Machine, Accel, Cpu, Smp, MemorySize, Drive, Qmp, Mon),
    *OBJECTS.values(),
    *CHARDEVS.values(),
    *DRIVERS.values(),
]
_VALUES = (
    "on",
    "off",
    "0",
    "1",
    "512",
    "1G",
    "18446744073709551615",
    "microvm",
    "unix:/q",
    "tcp:127.0.0.1:1",
    "",
    "=",
    ",",
    "\udcff",
)
WORDS = sorted({name for schema in SCHEMAS for name in (*schema.keys, schema.selector)} | {*_VALUES})
anything = st.text(max_size=40) | st.sampled_from(WORDS)
item = anything | st.tuples(st.sampled_from(WORDS), anything).map("=".join)
parameter_string = st.lists(item, max_size=6).map(",".join)
options = st.sampled_from(
    [f"-{name}" for name, option in OPTIONS.items() if option.state is not LATER] + ["-S", "-h", "-V", "--", "-x"]
)


def answer(argv: list[str]) -> Config | CommandLineError | Information:
    try:
        return parse(argv)
    except (CommandLineError, Information) as refusal:
        return refusal


@given(st.lists(options | anything | parameter_string, max_size=12))
@settings(max_examples=400, deadline=None)
@example(["-append", ""])
@example(["-m", "٣"])
@example(["-smp", "9" * 5000])
@example(["-mod-test", "\ud800"])
@example(["-V", "--version"])
def test_any_arguments_give_a_configuration_or_one_printable_line(argv: list[str]) -> None:
    result = answer(argv)
    if isinstance(result, CommandLineError):
        line = str(result)
        assert line.isprintable()
        assert len(line) < 2000
    else:
        assert isinstance(result, Config | Information)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
@given(text=parameter_string)
@settings(deadline=None)
def test_any_parameter_string_is_read_or_refused(schema: type[Parameters], text: str) -> None:
    try:
        read = schema.parse("-option", f"{schema.selector},{text}" if schema.selector else text)
    except CommandLineError:
        return
    assert schema.parse("-option", read.render()) == read


ids = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
switches = st.booleans()


@st.composite
def configurations(draw: st.DrawFn) -> list[str]:
    """Command lines that have to parse."""
    argv = ["-machine", f"microvm,acpi={draw(st.sampled_from(['on', 'off']))}", "-kernel", "k"]
    cpus = draw(st.integers(1, 254))
    memory = draw(st.integers(128, 512 * 1024))
    argv += ["-smp", f"{cpus},maxcpus={draw(st.integers(cpus, 254))}", "-m", f"{memory}"]
    where = draw(st.sampled_from([None, "ram", "memfd,share=on", "file,mem-path=/x", "ram,host-nodes=0-2:5,policy=bind"]))
    argv += draw(st.sampled_from([[], ["-mem-path", "/dev/shm"]])) if where != "file,mem-path=/x" else []
    if where:
        sizes = [64, memory - 64] if cpus > 1 else [memory]
        for node, size in enumerate(sizes):
            argv += ["-object", f"memory-backend-{where},id=m{node},size={size}"]
            argv += ["-numa", f"node,nodeid={node},cpus={node},memdev=m{node}", f"dist,src={node},dst=0,val={10 + 5 * node}"]
    drives = draw(st.lists(ids, unique=True, max_size=4))
    for number, name in enumerate(drives):
        escaped = name.replace(",", ",,")
        argv += ["-drive", f"id={escaped},file={number}{escaped},direct={draw(st.sampled_from(['on', 'off']))}"]
        argv += ["-device", f"virtio-blk-device,id={escaped},drive={escaped}"]
    argv += draw(st.sampled_from([[], ["-serial", "stdio"], ["-serial", "chardev:tty", "-chardev", "pty,id=tty"]]))
    qmp = draw(st.sampled_from(["", "unix:q,server,nowait", "tcp:1.2.3.4:5,server,nowait", "unix:q,server"]))
    argv += ["-qmp", qmp] if qmp else []
    argv += draw(st.sampled_from([[], ["-chardev", "socket,id=mon,path=p,server,nowait", "-mon", "chardev=mon,mode=control"]]))
    networks = draw(st.lists(ids, unique=True, max_size=2))
    for name in networks:
        escaped = name.replace(",", ",,")
        argv += ["-netdev", draw(st.sampled_from(["user,tcp-ports=1,,2,id=", "tap,fds=3:4,vhost=on,id="])) + escaped]
        argv += ["-device", f"virtio-net-device,netdev={escaped}"]
    argv += draw(st.sampled_from([[], ["-trace", "file=a,,b"]]))
    argv += draw(st.sampled_from([[], ["-S"], ["-mem-prealloc", "-D", "log"], ["-D"], ["-daemonize", "-pidfile", "p"]]))
    return argv


@given(configurations())
@settings(deadline=None)
def test_a_configuration_survives_being_written_and_read(argv: list[str]) -> None:
    first = answer(argv)
    if isinstance(first, CommandLineError):  # the daemon that wanted standard input
        assert first.option == "-daemonize"
    else:
        assert isinstance(first, Config)
        assert parse(render(first)) == first


@given(cpus=st.integers(1, 254), counts=st.tuples(*[st.none() | st.integers(1, 8)] * 5), maximum=st.none() | st.integers(0, 254))
@settings(deadline=None)
def test_a_topology_that_is_accepted_has_room_for_every_vcpu(
    cpus: int, counts: tuple[int | None, ...], maximum: int | None
) -> None:
    named = zip(("sockets", "dies", "clusters", "cores", "threads", "maxcpus"), (*counts, maximum), strict=True)
    text = ",".join([f"{cpus}", *(f"{name}={count}" for name, count in named if count is not None)])
    try:
        topology = Smp.parse("-smp", text).topology
    except CommandLineError:
        return
    product = topology.sockets * topology.dies * topology.clusters * topology.cores * topology.threads
    assert 1 <= topology.cpus == cpus <= topology.max_cpus == product <= 254


@given(st.integers(0, 1 << 70), st.sampled_from(["", "k", "K", "m", "M", "g", "G"]))
@settings(deadline=None)
def test_a_size_is_its_number_times_its_unit_or_out_of_bounds_or_not_in_pages(number: int, unit: str) -> None:
    size = number * {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "": 1 << 20}[unit.lower()]
    try:
        assert MemorySize.parse("-m", f"{number}{unit}").size == size
    except CommandLineError:
        assert size % 4096 or not 128 * MiB <= size <= 512 << 30
