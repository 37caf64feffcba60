"""Devices of a machine that are not virtio: serial port, clock, power, and the host's end of character devices.

Nothing is imported here: a machine imports the devices it has.
"""
