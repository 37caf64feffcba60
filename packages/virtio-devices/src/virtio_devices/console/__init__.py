"""The console device: `device` is what a guest sees, `port` one pair of its queues, `control` the messages about ports."""
