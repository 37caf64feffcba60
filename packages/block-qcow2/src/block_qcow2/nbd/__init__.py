"""Exporting an image over NBD: `protocol` is the wire format, `server` speaks it with anyio."""
