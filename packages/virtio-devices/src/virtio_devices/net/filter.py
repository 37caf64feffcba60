"""Which received frames a driver wants, as it said over the control queue (virtio 1.2, section 5.1.6.5.1 to 5.1.6.5.3).

A filter is never changed: commands make a new one, so that the loops of other queues read one that is whole.
"""

from __future__ import annotations

from typing import NamedTuple

TABLE_MAX = 64  # addresses, unicast and multicast together; with more, all of a kind are let through
VLANS = 4096

_BROADCAST = b"\xff" * 6
_VLAN_TAG = b"\x81\x00"  # IEEE 802.1Q: the tag protocol identifier


class RxFilter(NamedTuple):
    """A driver's wishes. `tables` with too many addresses are kept as None: everything of their kind is wanted."""

    mac: bytes
    promiscuous: bool = True
    all_multicast: bool = False
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: frozenset[bytes] | None = frozenset()
    multicast: frozenset[bytes] | None = frozenset()
    vlans: frozenset[int] | None = frozenset()  # None: VIRTIO_NET_F_CTRL_VLAN was not negotiated

    def accepts(self, frame: bytes) -> bool:
        """Tell whether the driver wants a frame that begins with these bytes, at least 14 and up to 18 of them."""
        if self.promiscuous:
            return True
        # 12 bits of the tag are the VLAN, the others its priority: a frame with a priority is no other VLAN's.
        if self.vlans is not None and frame[12:14] == _VLAN_TAG and int.from_bytes(frame[14:16], "big") % VLANS not in self.vlans:
            return False
        destination = frame[:6]
        if destination == _BROADCAST:
            return not self.no_broadcast
        if destination[0] & 1:
            if self.no_multicast:
                return False
            return self.all_multicast or self.multicast is None or destination in self.multicast
        if self.no_unicast:
            return False
        return self.all_unicast or destination == self.mac or self.unicast is None or destination in self.unicast
