"""The command line: what it means, and what each mistake is answered with."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pystratovirt.cmdline import CommandLineError, Config, Information, parse, parse_or_exit
from pystratovirt.cmdline.backends import Drive, FileChardev, IoThread, PtyChardev, RngRandom, SocketChardev, StdioChardev
from pystratovirt.cmdline.drivers.blk import VirtioBlk
from pystratovirt.cmdline.drivers.rng import VirtioRng
from pystratovirt.cmdline.drivers.serial import Virtconsole, VirtioSerial
from pystratovirt.cmdline.machine import MemoryNode, ignores_acpi
from pystratovirt.cmdline.options import LATER, OPTIONS
from pystratovirt.cmdline.values import GiB, MiB
from pystratovirt.main import main
from pystratovirt.slots import ACPI_END, LEGACY_END, place

KERNEL = ["-kernel", "vmlinuz"]
SPINE = [
    *("-machine", "microvm", "-smp", "2", "-m", "512", *KERNEL, "-append", "console=ttyS0 root=/dev/vda rw"),
    *("-drive", "file=rootfs.ext4,id=rootfs,readonly=off,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
    *("-qmp", "unix:/tmp/qmp.sock,server,nowait", "-serial", "stdio"),
]


def kernel(*argv: str) -> Config:
    return parse([*KERNEL, *argv])


def test_stratovirts_own_command_line_means_what_it_says() -> None:
    config = parse(SPINE)
    assert config.machine.type == "microvm"
    assert config.topology.cpus == 2
    assert config.memory.size == 512 * MiB
    assert config.kernel == "vmlinuz"
    assert config.append == "console=ttyS0 root=/dev/vda rw"
    assert config.drives == {"rootfs": Drive(id="rootfs", file="rootfs.ext4", direct=False)}
    assert config.drives["rootfs"].engine == "off"
    assert config.devices == (VirtioBlk(id="rootfs", drive="rootfs"),)
    assert [listener.path for listener in config.monitors] == ["/tmp/qmp.sock"]
    assert isinstance(config.serial, StdioChardev)


def test_defaults_are_stratovirts() -> None:
    config = kernel()
    assert config.memory.size == 256 * MiB
    assert config.topology.max_cpus == 1
    assert (config.memory.share, config.memory.dump, config.memory.prealloc) == (False, True, False)
    assert not config.freeze
    assert config.serial is None
    assert config.monitors == ()


def test_kata_containers_command_line_parses() -> None:
    config = parse([
        *("-name", "sandbox-1", "-uuid", "0b9fd0b1", "-smp", "4", "-m", "2048", *KERNEL, "-append", "a=b c"),
        *("-qmp", "unix:/run/vc/qmp.sock,server,nowait", "-D", "-disable-seccomp"),
        *("-machine", "type=microvm,dump-guest-core=off,mem-share=on"),
        *("-object", "rng-random,id=objrng0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0"),
        *("-drive", "id=rootfs,file=image,readonly=on,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0"),
        *("-device", "virtio-serial-device,id=virtio-serial0"),
        *("-chardev", "socket,id=charconsole0,path=/run/vc/console.sock,server,nowait"),
        *("-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0"),
    ])  # fmt: skip
    assert (config.memory.share, config.memory.dump) == (True, False)
    assert config.rngs == {"objrng0": RngRandom(id="objrng0", filename="/dev/urandom")}
    assert config.devices == (
        VirtioRng(rng="objrng0", id="virtio-rng0"),
        VirtioBlk(drive="rootfs", id="virtio-blk0"),
        VirtioSerial(id="virtio-serial0"),
        Virtconsole(chardev="charconsole0", id="virtio-console0", nr=0),
    )
    assert config.disable_seccomp
    assert config.log
    assert config.log_file is None


def test_what_says_something_about_other_machines_only_is_read_and_has_no_effect() -> None:
    config = kernel(
        *("-smbios", "type=0,vendor=v,date=d", "type=1,manufacturer=x,uuid=a5a5a5a5-0000-1111-2222-333344445555"),
        *("-smbios", "type=4,sock_pfx=s,max-speed=4000,current-speed=+3000", "-smbios", "type=17,loc_pfx=l,speed=3200"),
        *("-smbios", "asset=a,type=3", "location=here,type=2", "-global", "pcie-root-port.fast-unplug=1"),
    )
    assert config == kernel()
    assert kernel("-drive", "id=a,file=f,media=cdrom,readonly=on").drives["a"].media == "cdrom"


def test_nodes_say_what_memory_is_like_and_where_it_lies() -> None:
    config = kernel(
        *("-m", "1G", "-smp", "4", "-mem-prealloc"),
        *("-object", "memory-backend-memfd,id=b,size=768M,share=on,host-nodes=[0-1:3],policy=INTERLEAVE"),
        *("-object", "memory-backend-memfd,id=a,size=256M,share=on"),
        *("-numa", "node,nodeid=5,cpus=1:3,memdev=b", "-numa", "node,nodeid=0,cpus=0,memdev=a", "dist,src=0,dst=5,val=30"),
    )
    memory = config.memory
    assert (memory.size, memory.share, memory.prealloc, memory.path) == (1 * GiB, True, True, None)
    assert memory.nodes == (
        MemoryNode(size=256 * MiB),
        MemoryNode(size=768 * MiB, policy="interleave", host_nodes=(0, 1, 3)),
    )


def test_memory_of_nodes_can_be_in_a_folder_such_as_that_of_huge_pages() -> None:
    backend = "memory-backend-file,id=m,size=256M,mem-path=/dev/hugepages,dump-guest-core=off,mem-prealloc=on"
    memory = kernel("-object", backend, "-numa", "node,nodeid=0,cpus=0,memdev=m").memory
    assert (memory.path, memory.dump, memory.prealloc) == ("/dev/hugepages", False, True)


def test_a_memory_backend_that_no_node_uses_changes_nothing() -> None:
    config = kernel("-object", "memory-backend-memfd,id=m,size=1G,share=on")
    assert config.memory == kernel().memory


def test_there_are_at_most_eight_nodes() -> None:
    parts = [f"memory-backend-ram,id=m{n},size=32" for n in range(9)]
    nodes = [f"node,nodeid={n},cpus={n},memdev=m{n}" for n in range(9)]
    with pytest.raises(CommandLineError, match="-numa: 9 nodes; at most 8"):
        kernel("-m", "288", "-smp", "9", "-object", *parts, "-numa", *nodes)


def test_an_empty_name_or_log_file_is_none() -> None:
    assert kernel("-name", "", "-D", "") == kernel("-D")


@pytest.mark.parametrize(
    "argv",
    [
        ["-h", "-m"],
        ["-m", "-h"],
        ["-h", "words"],
        ["-m", "1", "-h", "-m", "2"],
        ["-S", "words", "-help"],
        ["-h", "-h", "-vnc", ":1"],
    ],
)
def test_who_asks_for_help_gets_it_however_often_options_and_values_are_there(argv: list[str]) -> None:
    with pytest.raises(Information):
        parse(argv)


@pytest.mark.parametrize(
    "argv", [["-h", "-bogus"], ["-V", "--version"], ["-bogus", "-h"], ["-m", "-V", "-bogus", "-x"], ["x", "-h"]]
)
def test_what_is_no_option_comes_before_the_help(argv: list[str]) -> None:
    with pytest.raises(CommandLineError, match=r"no such option|without an option"):
        parse(argv)


def test_what_libvirt_sends_without_effect_is_accepted() -> None:
    config = kernel(
        *("-machine", "microvm,accel=kvm:tcg,usb=off,dump-guest-core=off", "-accel", "kvm", "-cpu", "host"),
        *("-overcommit", "mem-lock=off", "-uuid", "u", "-no-user-config", "-nodefaults", "-sandbox", "on,obsolete=deny"),
        *("-msg", "timestamp=on", "-rtc", "base=utc", "-boot", "strict=on", "-nographic", "-realtime", "mlock=off", "-usb"),
        *("-display", "none", "-no-shutdown", "-battery"),
    )
    assert config.machine.accel == "kvm:tcg"


def test_values_of_a_repeated_option_are_pooled_in_order() -> None:
    assert kernel("-append", "a", "b=c", "-append", "d").append == "a b=c d"


def test_a_value_may_begin_with_a_dash_where_one_is_needed() -> None:
    assert kernel("-append", "--debug", "-name", "-x").append == "--debug"


def test_a_known_option_is_never_taken_for_a_value() -> None:
    with pytest.raises(CommandLineError, match="-append: needs a value"):
        parse(["-append", "-smp", "2"])


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert kernel("--", "-nonsense").kernel == "vmlinuz"


def test_flags_may_be_repeated() -> None:
    assert kernel("-S", "-freeze").freeze


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("6", (6, 6, 1, 1, 1, 6, 1)),
        ("cpus=4,maxcpus=8", (4, 8, 1, 1, 1, 8, 1)),
        ("8,sockets=2", (8, 8, 2, 1, 1, 4, 1)),
        ("8,cores=2", (8, 8, 4, 1, 1, 2, 1)),
        ("8,cores=2,sockets=2", (8, 8, 2, 1, 1, 2, 2)),
        ("2,sockets=2,dies=2,clusters=2,cores=2,threads=2", (2, 32, 2, 2, 2, 2, 2)),
        ("+3", (3, 3, 1, 1, 1, 3, 1)),
    ],
)
def test_a_topology_is_completed_as_stratovirt_does(text: str, shape: tuple[int, ...]) -> None:
    assert tuple(kernel("-smp", text).topology) == shape


@pytest.mark.parametrize(
    ("text", "size"),
    [("128", 128 * MiB), ("size=1G", GiB), ("262144k", 256 * MiB), ("512g", 512 * GiB), ("+200M", 200 * MiB)],
)
def test_memory_is_counted_in_mib_unless_a_unit_says_otherwise(text: str, size: int) -> None:
    assert kernel("-m", text).memory.size == size


def test_quotes_around_a_memory_path_are_dropped() -> None:
    assert kernel("-mem-path", '"/dev/hugepages"').memory.path == "/dev/hugepages"


def test_memory_in_a_file_can_be_preallocated() -> None:
    memory = kernel("-mem-path", "/dev/shm", "-mem-prealloc").memory
    assert (memory.path, memory.prealloc) == ("/dev/shm", True)


def test_two_commas_are_a_comma_inside_a_value() -> None:
    assert kernel("-drive", "id=a,file=one,,two").drives["a"].file == "one,two"


def test_a_value_may_contain_equals_signs() -> None:
    assert kernel("-drive", "id=a,file=x=y=").drives["a"].file == "x=y="


@pytest.mark.parametrize("flags", ["server,nowait", "server=on,wait=off", "server=on,nowait=on"])
def test_server_and_nowait_have_qemus_spelling_too(flags: str) -> None:
    config = kernel("-qmp", f"unix:q,{flags}", "-chardev", f"socket,id=c,path=s,{flags}", "-serial", "chardev:c")
    assert config.serial == SocketChardev(id="c", path="s", server=True, nowait=True)
    assert len(config.monitors) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stdio", StdioChardev(id="serial_chardev")),
        ("pty", PtyChardev(id="serial_chardev")),
        ("file,path=out", FileChardev(id="serial_chardev", path="out")),
        ("socket,path=s,server,nowait", SocketChardev(id="serial_chardev", path="s", server=True, nowait=True)),
        ("socket,port=99,server,nowait", SocketChardev(id="serial_chardev", port=99, server=True, nowait=True)),
    ],
)
def test_the_serial_port_takes_every_backend(text: str, expected: object) -> None:
    assert kernel("-serial", text).serial == expected


def test_a_serial_port_finds_its_chardev_whatever_the_order() -> None:
    assert kernel("-serial", "chardev:x", "-chardev", "pty,id=x").serial == PtyChardev(id="x")


def test_a_monitor_on_a_chardev_listens_where_the_chardev_says() -> None:
    config = kernel("-chardev", "socket,id=m,host=127.0.0.1,port=4444,server,nowait", "-mon", "chardev=m,id=mon0,mode=control")
    (listener,) = config.monitors
    assert (listener.path, listener.host, listener.port, listener.chardev) == (None, "127.0.0.1", 4444, "m")


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        (["-qmp", "unix:q,server"], [True]),
        (["-qmp", "unix:q,server,nowait"], [False]),
        (["-qmp", "tcp:127.0.0.1:5,server=on,wait=on"], [True]),
        (
            ["-chardev", "socket,id=m,path=p,server,wait=on", "-mon", "chardev=m,mode=control", "-qmp", "unix:q,server,nowait"],
            [False, True],
        ),
    ],
)
def test_a_monitor_that_is_not_told_nowait_is_waited_for(words: list[str], waits: list[bool]) -> None:
    assert [listener.wait for listener in kernel(*words).monitors] == waits


def test_devices_share_an_iothread_but_not_a_drive() -> None:
    config = kernel(
        *("-object", "iothread,id=io", "-drive", "id=a,file=f", "-drive", "id=b,file=g"),
        *("-device", "virtio-blk-device,drive=a,id=a,iothread=io", "-device", "virtio-blk-device,drive=b,id=b,iothread=io"),
    )
    assert config.iothreads == {"io": IoThread(id="io")}


def test_readonly_drives_can_share_a_file() -> None:
    assert len(kernel("-drive", "id=a,file=f,readonly=on", "id=b,file=f,readonly=on").drives) == 2


def test_test_mode_needs_no_kernel_and_no_drive() -> None:
    assert parse(["-machine", "microvm", "-mod-test", "unix:/tmp/t"]).test_socket == "/tmp/t"


def test_a_kernel_needs_neither_initrd_nor_drive_nor_monitor() -> None:
    assert kernel().initrd is None


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.state is LATER], ids=lambda o: o.name)
def test_an_option_that_is_known_and_does_not_work_yet_is_refused_by_name(option: object) -> None:
    name = f"-{option.name}"  # type: ignore[attr-defined]
    with pytest.raises(CommandLineError) as caught:
        kernel(name, "x")
    assert str(caught.value) == f"{name}: not supported yet"


def test_help_and_version_are_texts_and_no_machine() -> None:
    with pytest.raises(Information) as caught:
        parse(["-m", "nonsense", "-V", "-h"])
    text = caught.value.text
    assert all(
        f"-{option.name} " in text or f"-{option.name}\n" in text or f"-{option.name}," in text
        for option in OPTIONS.values()
        if option.state is not LATER
    )
    assert max(map(len, text.splitlines())) <= 120
    with pytest.raises(Information) as caught:
        parse(["-version"])
    assert caught.value.text.startswith("StratoVirt 2.4.0 (pystratovirt ")
    assert caught.value.text.count("\n") == 1


def test_the_commands_shown_by_help_parse() -> None:
    with pytest.raises(Information) as caught:
        parse(["-h"])
    command = caught.value.text.partition("\n  stratovirt ")[2]
    assert command
    assert parse(shlex.split(command.replace("\\\n", " "))).devices


WRONG = (Path(__file__).parent / "wrong_command_lines.txt").read_text().split("\n\n")[1:]


@pytest.mark.parametrize("case", WRONG, ids=[case.partition("\n")[0][2:] for case in WRONG])
def test_a_wrong_command_line_is_answered_with_one_line_and_status_1(
    case: str, capfd: pytest.CaptureFixture[str], kernel_file: str
) -> None:
    command, answer = case.strip().split("\n")
    argv = shlex.split(command.removeprefix("$ "))
    if "-kernel" not in argv and argv != ["-machine", "microvm"]:
        argv += ["-kernel", kernel_file]
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capfd.readouterr()
    assert err == f"{answer}\n"
    assert out == ""
    assert caught.value.code == 1


def test_the_command_itself_answers_so() -> None:
    command = subprocess.run([sys.executable, "-m", "pystratovirt", "-smp", "300"], capture_output=True, text=True, check=False)
    assert (command.returncode, command.stdout, command.stderr) == (1, "", "stratovirt: -smp 300: at most 254 vCPUs\n")


def test_there_are_enough_wrong_command_lines() -> None:
    assert len(WRONG) >= 40


@pytest.mark.parametrize(
    ("option", "value", "answer"),
    [
        ("-name", "n" * 256, f"-name {'n' * 117}...: at most 255 bytes, this is 256"),
        ("-qmp", f"unix:{'p' * 108},server,nowait", f"-qmp unix:{'p' * 108}: at most 107 bytes, this is 108"),
        ("-chardev", f"socket,id=x,path={'p' * 108}", f"-chardev socket: path={'p' * 108}: at most 107 bytes, this is 108"),
    ],
)
def test_a_value_that_is_too_long_is_cut_in_the_answer(option: str, value: str, answer: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        kernel(option, value)
    assert str(caught.value) == answer


def test_there_are_at_most_eight_iothreads() -> None:
    with pytest.raises(CommandLineError, match="-object iothread: id=io8: at most 8 iothreads"):
        kernel("-object", *(f"iothread,id=io{n}" for n in range(9)))


@pytest.fixture
def kernel_file(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    path.touch()
    return str(path)


def test_control_characters_in_a_value_do_not_reach_the_terminal() -> None:
    with pytest.raises(CommandLineError) as caught:
        kernel("-smp", "\x1b[31m\r\n\udcff")
    assert str(caught.value) == "-smp \\x1b[31m\\r\\n\\udcff: not a whole decimal number"


def disks(count: int) -> list[str]:
    return [
        text
        for n in range(count)
        for text in ("-drive", f"id=d{n},file=f{n}", "-device", f"virtio-blk-device,id=d{n},drive=d{n}")
    ]


def test_a_fifth_disk_has_no_room_without_acpi() -> None:
    with pytest.raises(CommandLineError, match="id=d4: a microvm without ACPI has room for 4 disks"):
        kernel("-machine", "microvm,acpi=off", *disks(5))


def test_a_fifth_disk_goes_behind_the_replaceable_slots_with_acpi() -> None:
    config = kernel(*disks(6))
    assert place(config.devices, config.netdevs, acpi=True) == [0, 1, 2, 3, 6, 7]


def test_a_machine_with_acpi_is_full_when_its_interrupts_are_used_up() -> None:
    room = ACPI_END - 6
    with pytest.raises(CommandLineError, match=f"id=d{room + 4}: a microvm has room for {room} devices beside 4 disks and 2"):
        kernel(*disks(room + 5))


@pytest.mark.parametrize("acpi", ["on", "off"])
def test_what_the_kernel_or_another_process_carries_leaves_the_network_slots_to_clients(acpi: str) -> None:
    netdevs = ("tap,id=a,ifname=a,vhost=on", "tap,id=b,ifname=b", "vhost-user,id=c,chardev=c", "tap,id=d,ifname=d")
    config = kernel(
        *("-machine", f"microvm,acpi={acpi}", "-chardev", "socket,id=c,path=c", "-netdev", *netdevs),
        *("-device", *(f"virtio-net-device,netdev={name},id={name}" for name in "abcd")),
    )
    assert place(config.devices, config.netdevs, acpi=acpi == "on") == [6, 4, 7, 5]


def test_a_third_network_that_is_carried_here_has_no_room_without_acpi() -> None:
    netdevs = [f"tap,id={name},ifname={name}" for name in "abc"]
    cards = [f"virtio-net-device,netdev={name},id={name}" for name in "abc"]
    with pytest.raises(CommandLineError, match="id=c: a microvm without ACPI has room for 2 network devices"):
        kernel("-machine", "microvm,acpi=off", "-netdev", *netdevs, "-device", *cards)
    config = kernel("-netdev", *netdevs, "-device", *cards)
    assert place(config.devices, config.netdevs, acpi=True) == [4, 5, 6]


@pytest.mark.parametrize(
    ("words", "ignored"),
    [
        ("", False),
        ("reboot=k panic=1 acpi=off", True),
        ("acpi=off acpi=force", False),
        ("acpi=on acpi=off", True),
        ("root=/dev/vda -- acpi=off", False),
        ("noacpi=off acpi=offline", False),
    ],
)
def test_a_kernel_is_told_to_ignore_acpi_by_the_last_word_about_it(words: str, ignored: bool) -> None:
    assert ignores_acpi(words) is ignored


def test_a_guest_that_ignores_acpi_has_no_more_devices_than_it_finds() -> None:
    room = LEGACY_END - 6
    config = kernel("-append", "acpi=off", *disks(room + 4))
    assert place(config.devices, {}, acpi=True, ignored=config.acpi_ignored)[-1] == LEGACY_END - 1
    told = f"id=d{room + 4}: a guest that is told acpi=off finds {room} devices beside 4 disks and 2 network devices"
    with pytest.raises(CommandLineError, match=told):
        kernel("-append", "acpi=off", *disks(room + 5))


def test_there_is_one_serial_controller() -> None:
    with pytest.raises(CommandLineError, match="id=b: one virtio-serial-device per machine"):
        kernel("-device", "virtio-serial-device,id=a", "virtio-serial-device,id=b")


def test_the_files_of_a_good_command_line_are_found(tmp_path: Path, kernel_file: str) -> None:
    config = parse_or_exit(
        ["-kernel", kernel_file, "-drive", f"id=a,file={kernel_file}", "-object", "rng-random,id=r,filename=/dev/urandom"]
    )
    assert config.kernel == kernel_file


def test_a_socket_is_no_drive(tmp_path: Path, kernel_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        with pytest.raises(SystemExit):
            parse_or_exit(["-kernel", kernel_file, "-drive", f"id=a,file={tmp_path / 's'}"])
    assert capfd.readouterr().err.endswith("not a regular file or a block device\n")


def test_a_configuration_is_frozen_and_says_what_it_lacks() -> None:
    config = kernel()
    with pytest.raises(AttributeError, match="Config is frozen"):
        config.kernel = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="Config is frozen"):
        del config.kernel
    with pytest.raises(TypeError, match="Drive needs a value for 'file'"):
        Drive(id="a")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Drive has no field 'colour'"):
        Drive(id="a", file="f", colour="red")  # type: ignore[call-arg]


def test_a_configuration_can_be_changed_into_another() -> None:
    one = Drive(id="a", file="f")
    assert one.replace(file="g") == Drive(id="a", file="g") != one
    assert len({one, one.replace(), Drive(id="a", file="g")}) == 2
    assert repr(IoThread(id="x")) == "IoThread(id='x')"
