"""The control queue (virtio 1.2, section 5.1.6.5): commands of the driver, each answered with one byte.

Commands are read as far as they are understood, whatever their length; a command that says more than it brings is an error.

Not here: what the answers lead to on other loops (`device`).
"""

from __future__ import annotations

from virtio_devices.net.buffers import peek
from virtio_devices.net.features import (
    ACK_ERR,
    ACK_OK,
    ANNOUNCE_ACK,
    CLASS_ANNOUNCE,
    CLASS_GUEST_OFFLOADS,
    CLASS_MAC,
    CLASS_MQ,
    CLASS_RX,
    CLASS_VLAN,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VLAN,
    F_GUEST_ANNOUNCE,
    F_MQ,
    GUEST_OFFLOADS,
    GUEST_OFFLOADS_SET,
    MAC_ADDR_SET,
    MAC_TABLE_SET,
    MQ_VQ_PAIRS_SET,
    RX_ALLMULTI,
    RX_ALLUNI,
    RX_NOBCAST,
    RX_NOMULTI,
    RX_NOUNI,
    RX_PROMISC,
    VLAN_ADD,
    VLAN_DEL,
)
from virtio_devices.net.filter import TABLE_MAX, VLANS, RxFilter
from virtio_devices.queue import QueueError, SplitQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Controlled(Protocol):
        """What commands change. On the control queue's loop."""

        negotiated: int

        @property
        def wishes(self) -> RxFilter:
            """Which frames the driver wants."""
            ...

        @wishes.setter
        def wishes(self, wishes: RxFilter) -> None: ...

        def set_mac(self, mac: bytes) -> None: ...

        def announced(self) -> None:
            """The driver has told the network where it is."""
            ...

        def set_pairs(self, count: int) -> bool:
            """Use the first `count` pairs of queues; False when that cannot be."""
            ...

        def set_guest_offloads(self, features: int) -> bool:
            """Deliver frames with these of the negotiated offloads; False when that cannot be."""
            ...


_SWITCHES = {
    RX_PROMISC: ("promiscuous", F_CTRL_RX),
    RX_ALLMULTI: ("all_multicast", F_CTRL_RX),
    RX_ALLUNI: ("all_unicast", F_CTRL_RX_EXTRA),
    RX_NOMULTI: ("no_multicast", F_CTRL_RX_EXTRA),
    RX_NOUNI: ("no_unicast", F_CTRL_RX_EXTRA),
    RX_NOBCAST: ("no_broadcast", F_CTRL_RX_EXTRA),
}


def serve_commands(device: Controlled, queue: SplitQueue) -> None:
    """Carry out the commands that are available. Raises QueueError for what is none."""
    for head, readable, writable in queue.chains():
        length = sum(map(len, readable))
        if length < 2 or not writable:
            raise QueueError(f"a command of {length} bytes with {sum(map(len, writable))} bytes for the answer")
        done = _Command(device, readable, length).run()
        writable[0][0] = ACK_OK if done else ACK_ERR
        queue.add_used(head, 1)


class _Command:
    def __init__(self, device: Controlled, views: list[memoryview], length: int) -> None:
        self._device, self._views, self._length = device, views, length

    def _data(self, offset: int, count: int) -> bytes | None:
        """Return `count` bytes from `offset` behind the header, None when the command has not that many."""
        return peek(self._views, 2 + offset, count) if 2 + offset + count <= self._length else None

    def _number(self, offset: int, size: int) -> int:
        """Return the little-endian number at `offset`, -1 when the command ends before."""
        data = self._data(offset, size)
        return -1 if data is None else int.from_bytes(data, "little")

    def run(self) -> bool:
        """Carry the command out; False when it is wrong, unknown, or of a feature that was not negotiated."""
        kind, command = peek(self._views, 0, 2)
        negotiated = self._device.negotiated
        if kind == CLASS_RX and command in _SWITCHES:
            return self._switch(*_SWITCHES[command])
        if kind == CLASS_MAC and command == MAC_TABLE_SET and negotiated & F_CTRL_RX:
            return self._set_table()
        if kind == CLASS_MAC and command == MAC_ADDR_SET and negotiated & F_CTRL_MAC_ADDR:
            mac = self._data(0, 6)
            if mac is None:
                return False
            self._device.set_mac(mac)
            return True
        if kind == CLASS_VLAN and command in (VLAN_ADD, VLAN_DEL) and negotiated & F_CTRL_VLAN:
            return self._set_vlan(command == VLAN_ADD)
        if kind == CLASS_ANNOUNCE and command == ANNOUNCE_ACK and negotiated & F_GUEST_ANNOUNCE:
            self._device.announced()
            return True
        if kind == CLASS_MQ and command == MQ_VQ_PAIRS_SET and negotiated & F_MQ:
            return self._device.set_pairs(self._number(0, 2))
        if kind == CLASS_GUEST_OFFLOADS and command == GUEST_OFFLOADS_SET and negotiated & F_CTRL_GUEST_OFFLOADS:
            wanted = self._number(0, 8)
            return wanted >= 0 and not wanted & ~(GUEST_OFFLOADS & negotiated) and self._device.set_guest_offloads(wanted)
        return False

    def _switch(self, name: str, feature: int) -> bool:
        value = self._number(0, 1)
        if value not in (0, 1) or not self._device.negotiated & feature:
            return False
        self._device.wishes = self._device.wishes._replace(**{name: bool(value)})  # type: ignore[arg-type]
        return True

    def _set_table(self) -> bool:
        """Take the tables of addresses (5.1.6.5.2): the numbers of entries are the driver's, the bytes decide."""
        tables: list[frozenset[bytes] | None] = []
        offset, room = 0, TABLE_MAX
        for _ in ("unicast", "multicast"):
            count = self._number(offset, 4)
            if count < 0 or 2 + offset + 4 + 6 * count > self._length:
                return False
            if count > room:
                tables.append(None)
            else:
                data = self._data(offset + 4, 6 * count) or b""
                tables.append(frozenset(data[at : at + 6] for at in range(0, len(data), 6)))
                room -= count
            offset += 4 + 6 * count
        self._device.wishes = self._device.wishes._replace(unicast=tables[0], multicast=tables[1])
        return True

    def _set_vlan(self, add: bool) -> bool:
        vlan = self._number(0, 2)
        wishes = self._device.wishes
        if not 0 <= vlan < VLANS or wishes.vlans is None:
            return False
        self._device.wishes = wishes._replace(vlans=wishes.vlans | {vlan} if add else wishes.vlans - {vlan})
        return True
