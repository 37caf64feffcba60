"""The socket device (virtio 1.2, section 5.10): with the kernel's vhost, or with unix sockets and no kernel module."""
