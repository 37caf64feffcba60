"""The balloon with a stock guest: memory that the guest does without is the host's again, and comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import WAIT, Qmp, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20
RAM = 448 * MiB


def fill(mebibytes: int) -> str:
    """Have a file in the guest's memory take so much of it: one page at a time costs the lab's nested guests 15 s a GiB."""
    return f"dd if=/dev/zero of=/mnt/fill bs=1M count={mebibytes} 2>/dev/null"


Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture
def boot(start: Start, cloud_kernel: guests.Kernel, rootfs: Path, folder: Path) -> Callable[..., Vmm]:
    """Boot to a shell on a machine with a balloon."""
    initrd = guests.initrd(cloud_kernel, (*guests.MODULES, "virtio_balloon"))

    def boot(machine: str, balloon: str) -> Vmm:
        vmm = start(
            "-machine", machine, "-m", RAM // MiB, "-kernel", cloud_kernel.image, "-initrd", initrd,
            "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 transparent_hugepage=never",
            "-drive", f"file={rootfs},id=rootfs,readonly=off,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
            "-device", f"virtio-balloon-device,id=balloon{balloon}",
            "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
        )  # fmt: skip
        vmm.expect(PROMPT)
        vmm.run("mount -t tmpfs -o size=100% none /mnt")
        return vmm

    return boot


def pss(vmm: Vmm) -> int:
    """What the VMM takes of the host's memory, in bytes."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{vmm.pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def settled(vmm: Vmm) -> int:
    """What the VMM takes when it takes no less any more: a guest reports free pages in turns, two seconds apart."""
    seen, since = pss(vmm), time.monotonic()
    while time.monotonic() < since + 5:
        time.sleep(0.2)
        if (now := pss(vmm)) < seen - MiB // 4:
            seen, since = now, time.monotonic()
    return pss(vmm)


def moved(client: Qmp, to: int) -> None:
    """Ask for `to` bytes, and wait until the guest has that."""
    client.execute("balloon", {"value": to})
    while client.event("BALLOON_CHANGED")["data"]["actual"] != to:
        pass
    assert client.execute("query-balloon")["actual"] == to


def test_an_inflated_balloon_is_the_host_s_memory_and_a_deflated_one_the_guest_s(boot: Callable[..., Vmm], qmp: Connect) -> None:
    vmm, client = boot("microvm", ",deflate-on-oom=true,guest-stats-polling-interval=1"), qmp()
    assert client.execute("query-balloon")["actual"] == RAM
    vmm.run(f"{fill(288)}; rm /mnt/fill")
    full = pss(vmm)
    assert full > 288 * MiB, "a guest's free memory is the host's loss"
    before = int(vmm.run("awk '/MemTotal/ {print $2}' /proc/meminfo")) * 1024
    moved(client, RAM - 256 * MiB)
    wait_for(lambda: pss(vmm) < full - 240 * MiB, "the host has its memory")
    # A guest that may deflate keeps its total; what is in the balloon is only not free.
    wait_for(lambda: client.execute("query-balloon")["stats"]["stat-free-memory"] < before - 256 * MiB, "statistics say so too")
    assert client.execute("query-balloon")["stats"]["stat-total-memory"] == pytest.approx(before, abs=MiB)
    # The guest's needs come first: with deflate-on-oom it takes back what it gave.
    low = pss(vmm)
    assert vmm.run(f"{fill(160)}; stat -c %s /mnt/fill").strip() == str(160 * MiB)
    assert client.execute("query-balloon")["actual"] > RAM - 256 * MiB
    assert pss(vmm) > low + 80 * MiB
    vmm.run("rm /mnt/fill")
    moved(client, RAM)
    client.execute("quit")
    assert vmm.wait() == 0


@pytest.mark.soak
def test_free_pages_of_shared_memory_come_back_unasked(boot: Callable[..., Vmm], qmp: Connect) -> None:
    vmm, client = boot("microvm,mem-share=on", ",free-page-reporting=true"), qmp()
    vmm.run(fill(128))
    full = pss(vmm)
    vmm.run("rm /mnt/fill")
    wait_for(lambda: pss(vmm) < full - 100 * MiB, "what the guest freed is free")
    low = settled(vmm)
    vmm.run(fill(128))
    assert pss(vmm) > low + 100 * MiB, "what the guest takes again is there again"
    vmm.run("rm /mnt/fill; for n in 1 2 3 4 5 6 7 8 9 10; do cat /bin/busybox; done > /mnt/copies")
    assert vmm.run("for n in 1 2 3 4 5 6 7 8 9 10; do cat /bin/busybox; done | cmp - /mnt/copies && echo same").strip() == "same"
    client.execute("stop")
    client.execute("cont")
    moved(client, RAM - 32 * MiB)
    vmm.send("poweroff")
    assert vmm.wait() == 0
