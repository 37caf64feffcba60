"""A StratoVirt-compatible virtual machine monitor: the commands stratovirt and qmp, and the Python API to embed a virtual machine."""
