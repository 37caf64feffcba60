"""The virtio block device (virtio 1.2, section 5.2) and what it needs of a disk."""
