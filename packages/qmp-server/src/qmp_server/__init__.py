"""An anyio QMP server over unix and TCP sockets with leaky-bucket flow control."""
