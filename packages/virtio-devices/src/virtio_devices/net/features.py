"""Numbers of the network device (virtio 1.2, section 5.1): feature bits, configuration space, headers, control commands.

Not here: what is done about them.
"""

from __future__ import annotations

from struct import Struct

# Feature bits (5.1.3), as masks
F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX, F_CTRL_VLAN = 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19
F_CTRL_RX_EXTRA, F_GUEST_ANNOUNCE, F_MQ, F_CTRL_MAC_ADDR = 1 << 20, 1 << 21, 1 << 22, 1 << 23

GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO
HOST_OFFLOADS = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO
OFFLOADS = GUEST_OFFLOADS | HOST_OFFLOADS
"""Work on frames that a driver leaves to the other side: offered as far as what carries the frames can do it."""

CONTROL = F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR | F_GUEST_ANNOUNCE

# 5.1.3.1: who is chosen needs one of those behind it.
REQUIREMENTS = (
    (F_GUEST_TSO4, F_GUEST_CSUM),
    (F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_GUEST_UFO, F_GUEST_CSUM),
    (F_HOST_TSO4, F_CSUM),
    (F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
    (F_HOST_UFO, F_CSUM),
    (F_CTRL_RX, F_CTRL_VQ),
    (F_CTRL_VLAN, F_CTRL_VQ),
    (F_GUEST_ANNOUNCE, F_CTRL_VQ),
    (F_MQ, F_CTRL_VQ),
    (F_CTRL_MAC_ADDR, F_CTRL_VQ),
    (F_CTRL_GUEST_OFFLOADS, F_CTRL_VQ),
    (F_CTRL_RX_EXTRA, F_CTRL_VQ),  # not in the text; its commands have no other way
)

# virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu
CONFIG = Struct("<6sHHH")
CONFIG_STATUS = 6
S_LINK_UP, S_ANNOUNCE = 1, 2

HEADER = 12  # bytes of virtio_net_hdr (5.1.6) with num_buffers, as every modern driver has it
NUM_BUFFERS = 10  # offset of that field
ETHERNET = 14  # bytes of a frame without which it is none

# Control commands (5.1.6.5): class and command
RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST = range(6)
CLASS_RX, CLASS_MAC, CLASS_VLAN, CLASS_ANNOUNCE, CLASS_MQ, CLASS_GUEST_OFFLOADS = range(6)
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1
ANNOUNCE_ACK = 0
MQ_VQ_PAIRS_SET = 0
GUEST_OFFLOADS_SET = 0
ACK_OK, ACK_ERR = 0, 1

PAIRS_MAX = 16  # of queues (reference virtio, section 6.1)
