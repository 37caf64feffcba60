"""Exporting an image over vhost-user-blk: a virtual machine's rings, served by this process.

`protocol` is the wire format, `memory` what the front end lends us, `virtqueue` the rings in it, `session` the state of one
front end, `blk` the requests, `server` the socket and the loop. The engine stands alone (no virtio package may be imported), and
a ring seen from outside a virtual machine has needs of its own: user addresses, memory that comes and goes, requests that an
earlier back end left unfinished.
"""
