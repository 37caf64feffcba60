"""The header of every packet (virtio 1.2, section 5.10.6), and the numbers in it.

Not here: what a packet does to a connection.
"""

from __future__ import annotations

from struct import Struct

HOST_CID = 2  # 5.10.4: the host's context id
CID_MIN, CID_MAX = 3, 0xFFFF_FFFE  # what a guest may have; the last one of 32 bits is VMADDR_CID_ANY

# struct virtio_vsock_hdr: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
HEADER = Struct("<QQIIIHHIII")

STREAM = 1  # type; SEQPACKET (2) is offered by vhost only

# op
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = 1, 2, 3, 4, 5, 6, 7

# flags of SHUTDOWN: the sender will not receive, will not send any more
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2
SHUTDOWN_BOTH = 3
