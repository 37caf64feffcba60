"""The ways a channel gets its requests to the kernel: `threads` (and `off`), `native` (libaio), `io_uring`."""
