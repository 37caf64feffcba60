"""The command `qmp`: a one-shot client and an interactive shell for any QMP server (this VMM, StratoVirt, QEMU)."""
