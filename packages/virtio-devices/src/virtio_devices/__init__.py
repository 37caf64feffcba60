"""Virtio devices for virtual machine monitors: virtqueues, transports, block, console and entropy devices."""
