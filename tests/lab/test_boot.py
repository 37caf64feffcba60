"""A stock Debian kernel on the microvm: boots, does I/O, powers off, reboots, with every form of guest memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import Qmp, QmpError, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture
def arguments(cloud_kernel: guests.Kernel, initrd: Path, rootfs: Path, folder: Path) -> list[object]:
    """StratoVirt's command line for a microVM with a root disk, but for -smp and -m. -qmp is folder/qmp.sock."""
    return [
        *("-machine", "microvm", "-kernel", cloud_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1"),
        *("-drive", f"file={rootfs},id=rootfs,readonly=off,direct=off"),
        *("-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    ]


@pytest.mark.plain_command_line
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_stock_kernel_boots_to_a_shell_on_every_cpu_and_powers_off(
    start: Start, qmp: Connect, arguments: list[object], cpus: int
) -> None:
    vmm = start(*arguments, "-smp", cpus, "-m", 512)
    vmm.expect(PROMPT)
    assert int(vmm.run("nproc")) == cpus
    client = qmp()
    assert client.execute("query-status") == {"running": True, "singlestep": False, "status": "running"}
    threads = {cpu["thread_id"] for cpu in client.execute("query-cpus")}
    assert len(threads) == cpus
    assert all(Path(f"/proc/{vmm.pid}/task/{thread}").is_dir() for thread in threads)
    vmm.send("poweroff")
    assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vmm.wait() == 0


def test_the_disk_gives_back_what_it_was_given_inside_and_outside(start: Start, arguments: list[object], folder: Path) -> None:
    inside, outside = folder / "inside", folder / "outside"
    payload = hashlib.shake_256(b"payload").digest(64 * MiB)
    inside.write_bytes(payload)
    outside.write_bytes(bytes(64 * MiB))
    vmm = start(
        *arguments, "-smp", 2, "-m", 512,
        "-drive", f"file={inside},id=in,readonly=on,direct=off", "-device", "virtio-blk-device,drive=in,id=in,serial=source",
        "-drive", f"file={outside},id=out,direct=off", "-device", "virtio-blk-device,drive=out,id=out",
    )  # fmt: skip
    vmm.expect(PROMPT)
    assert vmm.run("cat /sys/block/vdb/serial").strip() == "source"
    assert vmm.run("cat /sys/block/vdb/ro").strip() == "1"
    assert vmm.run("sha256sum < /dev/vdb").split()[0] == hashlib.sha256(payload).hexdigest()
    vmm.run("dd if=/dev/vdb of=/dev/vdc bs=1M conv=fsync")
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert hashlib.sha256(outside.read_bytes()).hexdigest() == hashlib.sha256(payload).hexdigest()


@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.soak)])
def test_a_reboot_resets_the_guest_once_and_it_boots_again_though_its_files_are_gone(
    start: Start, qmp: Connect, arguments: list[object], folder: Path, times: int
) -> None:
    files: dict[str, Path] = {}
    for option in ("-kernel", "-initrd"):
        at = arguments.index(option) + 1
        files[option] = folder / option[1:]
        shutil.copy(str(arguments[at]), files[option])
        arguments[at] = files[option]
    vmm = start(*arguments, "-smp", 2, "-m", 512)
    vmm.expect(PROMPT)
    for file in files.values():
        file.unlink()  # as a package's upgrade does under a guest that runs
    client = qmp()
    for _ in range(times):
        vmm.run("date > /root/stamp; sync")
        vmm.send("reboot")
        client.event("RESET")
        vmm.expect("initrd: up")
        vmm.expect(PROMPT)
        assert vmm.run("cat /root/stamp")
        # What has happened until now comes before the reply. Linux has three ways to reset, and tries one after the other.
        client.execute("query-status")
        assert client.events == [], "one RESET for one reboot, and nothing else"
    vmm.send("poweroff")
    assert vmm.wait() == 0


def test_qmp_resets_a_running_guest_and_the_power_button_powers_it_off(
    start: Start, qmp: Connect, arguments: list[object]
) -> None:
    vmm = start(*arguments, "-smp", 2, "-m", 512)
    vmm.expect(PROMPT)
    client = qmp()
    client.execute("system_reset")
    client.event("RESET")
    vmm.expect("initrd: up")
    vmm.expect(PROMPT)
    client.execute("system_powerdown")
    client.event("POWERDOWN")
    assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vmm.wait() == 0


def test_a_guest_that_waits_starts_on_cont_stops_and_goes_on_once_however_often_it_is_asked_and_ends_by_a_signal(
    start: Start, qmp: Connect, arguments: list[object]
) -> None:
    vmm = start(*arguments, "-m", 512, "-S")
    client = qmp()
    assert client.execute("query-status")["status"] == "paused"
    assert vmm.output() == ""
    client.execute("cont")
    client.event("RESUME")
    vmm.expect(PROMPT)
    for command in ("stop", "stop", "cont", "cont"):
        assert client.execute(command) == {}
    client.execute("query-status")
    assert [event["event"] for event in client.events] == ["STOP", "RESUME"]
    assert vmm.run("echo still here") == "still here\n"
    vmm.signal(15)
    assert client.event("SHUTDOWN")["data"] == {"guest": False, "reason": "Guest shutdown by signal 15"}
    assert vmm.wait() == 0


def test_a_guest_loses_nothing_and_its_clock_never_goes_back_over_fifty_pauses(
    start: Start, qmp: Connect, arguments: list[object]
) -> None:
    vmm = start(*arguments, "-smp", 2, "-m", 512)
    vmm.expect(PROMPT)
    # A writer that checks every block it wrote, and a watcher that says so when the time since the boot or the time of day goes
    # back. /tmp/rounds always has a number in it: how often the writer has been round.
    vmm.run("mkdir /root/w; mount -t tmpfs t /tmp; echo 0 > /tmp/rounds")
    vmm.run(
        "(i=0; while [ ! -e /root/stop ]; do dd if=/dev/urandom of=/root/w/f bs=64k count=16 2>/dev/null;"
        " s=$(sha256sum < /root/w/f); sync; echo 3 > /proc/sys/vm/drop_caches;"
        ' [ "$s" = "$(sha256sum < /root/w/f)" ] || echo LOST > /root/bad; i=$((i+1)); echo $i > /tmp/r; mv /tmp/r /tmp/rounds;'
        " done) &"
    )
    vmm.run(
        "(last=0; day=0; while [ ! -e /root/stop ]; do now=$(cut -d' ' -f1 /proc/uptime | tr -d .); today=$(date +%s);"
        ' [ "$now" -ge "$last" ] || echo BACK $last $now > /root/bad; last=$now;'
        ' [ "$today" -ge "$day" ] || echo BACK $day $today > /root/bad; day=$today; done) &'
    )
    client = qmp()
    for number in range(50):
        if number % 10 == 0:  # the pauses fall between rounds of I/O, and not all into one
            vmm.run("n=$(cat /tmp/rounds); while [ $(cat /tmp/rounds) = $n ]; do sleep 0.1; done")
        client.execute("stop")
        assert client.event("STOP")["data"] == {}
        assert not client.execute("query-status")["running"]
        client.execute("cont")
        client.event("RESUME")
    rounds = int(vmm.run("cat /tmp/rounds"))
    vmm.run("touch /root/stop; wait; sync")
    assert int(vmm.run("cat /tmp/rounds")) > rounds >= 5, "the disk works on after the last pause"
    assert vmm.run("cat /root/bad 2>/dev/null || true") == ""
    # Not soft lockups nor an unstable clock source: a guest on a busy host reports those without any pause.
    assert vmm.run("dmesg | grep -iE 'I/O error|Buffer I/O|EXT4-fs error' || true") == ""
    vmm.send("poweroff")
    assert vmm.wait() == 0


def test_an_unknown_command_is_answered_by_its_class(start: Start, qmp: Connect, arguments: list[object]) -> None:
    vmm = start(*arguments, "-m", 512, "-S")
    client = qmp()
    with pytest.raises(QmpError) as caught:
        client.execute("make-coffee")
    assert caught.value.kind == "CommandNotFound"
    client.execute("quit")
    assert client.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert vmm.wait() == 0


def test_cpus_come_up_from_the_mp_table_when_the_guest_ignores_acpi(
    start: Start, qmp: Connect, generic_kernel: guests.Kernel, folder: Path
) -> None:
    initrd = guests.initrd(generic_kernel, modules=(), script="echo cpus=$(nproc)=; exec sh")
    for machine, words in (("microvm", "acpi=off"), ("microvm,acpi=off", "")):
        vmm = start(
            *("-machine", machine, "-smp", 4, "-m", 512, "-kernel", generic_kernel.image, "-initrd", initrd),
            *("-append", f"console=ttyS0 quiet panic=-1 {words}", "-serial", "stdio"),
            *("-qmp", f"unix:{folder}/qmp.sock,server,nowait"),
        )  # fmt: skip
        assert vmm.expect(r"cpus=(\d+)=")[1] == "4"
        qmp().execute("quit")
        assert vmm.wait() == 0


def test_a_guest_as_kata_starts_it_leaves_the_fourth_disk_its_interrupt_and_ends_the_process_when_it_panics(
    start: Start, qmp: Connect, generic_kernel: guests.Kernel, folder: Path
) -> None:
    """`acpi=off reboot=k panic=1`, on a machine that has ACPI. (Stock kernels find no virtio-mmio device then, Kata's do.)"""
    script = "echo now; cat /proc/interrupts; echo ready; read x; echo c > /proc/sysrq-trigger"
    initrd = guests.initrd(generic_kernel, modules=(), script=script)
    vmm = start(
        *("-machine", "type=microvm,dump-guest-core=off", "-m", 512, "-kernel", generic_kernel.image, "-initrd", initrd),
        *("-append", "reboot=k panic=1 acpi=off console=ttyS0 quiet", "-serial", "stdio"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait"),
    )  # fmt: skip
    interrupts = vmm.expect(r"(?s)now(.*)ready")[1]
    assert " ttyS0" in interrupts
    assert "rtc" not in interrupts  # its driver finds a clock that it does not like, and takes no interrupt
    client = qmp()
    vmm.send("")
    assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vmm.wait() == 0


@pytest.mark.soak
def test_a_triple_fault_without_acpi_ends_the_machine(
    start: Start, qmp: Connect, generic_kernel: guests.Kernel, folder: Path
) -> None:
    initrd = guests.initrd(generic_kernel, modules=(), script="echo ready; read x; echo b > /proc/sysrq-trigger")
    vmm = start(
        *("-machine", "microvm,acpi=off", "-m", 256, "-kernel", generic_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet reboot=t", "-serial", "stdio"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait"),
    )  # fmt: skip
    vmm.expect("ready")
    client = qmp()
    vmm.send("")
    assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vmm.wait() == 0


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (4096, []),
        pytest.param(512, ["-mem-path", "FOLDER"], marks=pytest.mark.soak),
        (1024, ["-machine", "microvm,mem-share=on", "-mem-prealloc", "-mem-path", "FOLDER"]),
        pytest.param(1024, [], marks=pytest.mark.soak),
        pytest.param(512, ["-mem-path", "FOLDER/ram"], marks=pytest.mark.soak),
        pytest.param(512, ["-machine", "microvm,mem-share=on"], marks=pytest.mark.soak),
        pytest.param(512, ["-mem-prealloc"], marks=pytest.mark.soak),
    ],
)
def test_the_guest_has_the_memory_that_was_asked_for(
    start: Start, arguments: list[object], folder: Path, size: int, options: list[str]
) -> None:
    options = [option.replace("FOLDER", str(folder)) for option in options]
    if "-machine" in options:
        arguments = arguments[2:]
    vmm = start(*arguments, "-m", size, *options)
    vmm.expect(PROMPT)
    ram = [
        tuple(int(end, 16) for end in line.split(" :")[0].split("-"))
        for line in vmm.run("grep 'System RAM' /proc/iomem").splitlines()
    ]
    # The guest loses the few pages below 1 MiB that the firmware area and page 0 take.
    assert size * MiB - sum(last + 1 - first for first, last in ram) < MiB
    assert all(last < 0xC000_0000 or first >= 0x1_0000_0000 for first, last in ram)
    # Memory beyond the gap, which Linux takes first, holds what is written too, and no two pages of it are one: a file bigger
    # than that, of blocks that each have a page with their number and 16 MiB of noise. So what lies at a distance of a power of
    # two differs, and what is in two places has lost what was written first. Every number is read back, and the last block.
    blocks = (max(size - 3072, 0) + 192) // 16
    vmm.run("mount -t tmpfs -o size=90% t /mnt; cd /mnt; dd if=/dev/urandom of=noise bs=1M count=1 2>/dev/null")
    vmm.run("block='noise noise noise noise'; block=\"$block $block $block $block\"")
    each = f"i=0; while [ $i -lt {blocks} ]; do"
    vmm.run(f"{each} printf '%-4096d' $i; cat $block; i=$((i+1)); done > file", 300)
    number = "$(dd if=file bs=4k skip=$((i*4097)) count=1 2>/dev/null)"
    assert vmm.run(f"{each} [ {number} = $i ] || echo $i; i=$((i+1)); done", 300) == ""
    end = f"dd if=file bs=4k skip={blocks * 4097 - 4096} 2>/dev/null"
    assert len(set(vmm.run(f"{end} | md5sum; cat $block | md5sum", 300).split())) == 2  # the sum, and "-"
    vmm.send("poweroff")
    assert vmm.wait() == 0


def test_kill_9_leaves_nothing_that_stops_the_next_start(start: Start, arguments: list[object]) -> None:
    vmm = start(*arguments, "-m", 512)
    vmm.expect(PROMPT)
    vmm.kill()
    vmm = start(*arguments, "-m", 512)
    vmm.expect(PROMPT)
    vmm.send("poweroff")
    assert vmm.wait() == 0


def test_an_image_that_is_in_use_is_refused_by_name(start: Start, arguments: list[object], rootfs: Path) -> None:
    first = start(*arguments, "-m", 256, "-S")
    with Qmp(rootfs.parent / "qmp.sock") as client:  # greeted: the machine is built, and its image locked
        second = start(*[str(word).replace("qmp.sock", "second.sock") for word in arguments], "-m", 256)
        assert second.wait() == 1
        assert str(rootfs) in second.errors()
        assert len(second.errors().splitlines()) == 1
        client.execute("quit")
    assert first.wait() == 0
