"""What a microvm has room for: its slots, and who may be in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lab import guests
from lab.vmm import Qmp, Vmm

Start = Callable[..., Vmm]


def test_without_acpi_there_are_eleven_slots_and_five_of_them_are_for_devices_that_stay(start: Start, folder: Path) -> None:
    def devices(count: int) -> list[object]:
        rngs = [
            ("-object", f"rng-random,id=r{n},filename=/dev/urandom", "-device", f"virtio-rng-device,rng=r{n},id=d{n}")
            for n in range(count)
        ]
        return [word for words in rngs for word in words]

    kernel = guests.kernel("cloud")
    common = ("-machine", "microvm,acpi=off", "-kernel", kernel.image, "-S", "-qmp", f"unix:{folder}/qmp.sock,server,nowait")
    full = start(*common, *devices(5))
    with Qmp(folder / "qmp.sock") as client:
        assert client.execute("query-status")["status"] == "paused"
        client.execute("quit")
    assert full.wait() == 0
    over = start(*common, *devices(6))
    assert over.wait() == 1
    assert over.errors().strip().endswith("a microvm without ACPI has room for 5 other devices")
