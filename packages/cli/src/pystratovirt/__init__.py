"""A StratoVirt-compatible virtual machine monitor: the commands stratovirt and qmp, and the API to embed a machine."""
