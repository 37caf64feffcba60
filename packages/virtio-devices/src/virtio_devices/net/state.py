"""Saved state of a network device: what its driver said over the control queue.

Not here: features, queues and status, which the transport saves, and the link, which is the back end's.
"""

from __future__ import annotations

from typing import NamedTuple

from virtio_devices.net.filter import TABLE_MAX, VLANS, RxFilter
from vmm_core.state import versioned

_SWITCHES = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast")


@versioned(1)
class NetState(NamedTuple):
    """What the driver said over the control queue. `switches` is a bit for each of the filter's, `None` a table that is full."""

    mac: bytes
    announcing: bool
    pairs: int
    guest_offloads: int
    switches: int
    unicast: tuple[bytes, ...] | None
    multicast: tuple[bytes, ...] | None
    vlans: tuple[int, ...] | None


def saved_state(mac: bytes, announcing: bool, pairs: int, guest_offloads: int, wishes: RxFilter) -> NetState:
    """Return the state of a device that has a driver."""
    return NetState(
        mac,
        announcing,
        pairs,
        guest_offloads,
        sum(1 << at for at, name in enumerate(_SWITCHES) if getattr(wishes, name)),
        None if wishes.unicast is None else tuple(sorted(wishes.unicast)),
        None if wishes.multicast is None else tuple(sorted(wishes.multicast)),
        None if wishes.vlans is None else tuple(sorted(wishes.vlans)),
    )


def fits(saved: NetState, pairs: int, guest_offloads: int) -> bool:
    """Tell whether a device with these pairs and offloads can have the state."""
    tables = [*(saved.unicast or ()), *(saved.multicast or ())]
    return (
        len(saved.mac) == 6
        and 0 <= saved.pairs <= pairs
        and not saved.guest_offloads & ~guest_offloads
        and not saved.switches >> len(_SWITCHES)
        and len(tables) <= TABLE_MAX
        and all(len(address) == 6 for address in tables)
        and all(0 <= vlan < VLANS for vlan in saved.vlans or ())
    )


def saved_wishes(saved: NetState) -> RxFilter:
    """Return the filter of a state that fits."""
    unicast, multicast = (None if table is None else frozenset(table) for table in (saved.unicast, saved.multicast))
    vlans = None if saved.vlans is None else frozenset(saved.vlans)
    switches = {name: bool(saved.switches & 1 << at) for at, name in enumerate(_SWITCHES)}
    return RxFilter(saved.mac, unicast=unicast, multicast=multicast, vlans=vlans)._replace(**switches)  # type: ignore[arg-type]
