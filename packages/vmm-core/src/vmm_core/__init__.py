"""What a virtual machine monitor is made of: KVM, guest memory, buses, interrupts, threads, boot loaders and machines.

Nothing is imported here: a start imports only what it uses, so every name is taken from the module that defines it.
"""
