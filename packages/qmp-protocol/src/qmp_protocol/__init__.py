"""Sans-I/O QMP (QEMU Machine Protocol): framing, messages, connection state machines and a typed command schema."""
