"""Puts disks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_devices.blk.device import BlkDevice

if TYPE_CHECKING:
    from pystratovirt.cmdline.backends import Drive
    from pystratovirt.cmdline.drivers.blk import VirtioBlk
    from pystratovirt.vm import VirtualMachine


def build_blk(vm: VirtualMachine, device: VirtioBlk, name: str) -> BlkDevice:
    """Return a disk on the drive that `device` names."""
    drive: Drive = vm.drives[device.drive]
    return BlkDevice(
        name,
        vm.loops(device.iothread),
        vm.clock,
        disk=vm.disks[device.drive],
        serial=device.serial or "",
        num_queues=device.num_queues,
        queue_size=device.queue_size,
        read_only=drive.readonly,
        discard=drive.discard,
        # StratoVirt offers it only with detect-zeroes; every disk can do it, and guests fall back to writing zeroes.
        write_zeroes=not drive.readonly,
        iops=drive.iops_total or 0,
        bps=drive.bps_total or 0,
    )


def empty_blk(vm: VirtualMachine, slot: int) -> BlkDevice:
    """Return a disk that is not there yet: clients may fill the slot later, guests see a capacity of 0 until then.

    A driver chooses now what it may ask of every disk to come, so it is offered everything.
    """
    return BlkDevice(f"blk-slot{slot}", [vm.main_loop], vm.clock, discard=True, write_zeroes=True)
