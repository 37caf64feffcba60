"""vhost-user: devices whose queues another process serves, over a unix socket and shared guest memory."""
