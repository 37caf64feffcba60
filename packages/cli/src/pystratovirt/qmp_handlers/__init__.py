"""What QMP commands do to a virtual machine: a module a subject, each with a `register(server, runtime)`."""
