"""Virtio devices for virtual machine monitors: virtqueues, the MMIO transport, and devices, vhost-user among them."""
