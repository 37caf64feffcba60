"""Network devices (virtio 1.2, section 5.1): the device, its control queue, and the ways to a network that it can be given."""
