"""The lab: a host inside a host, with a real /dev/kvm, for machines that have none.

QEMU's software emulation runs a stock distribution kernel whose kvm-amd (emulated SVM) gives a real /dev/kvm; the
machine's own files are shared into it copy-on-write, so a command runs there with the same Python and checkout.

Not here: anything of the virtual machine monitor itself. The lab needs Python >= 3.11 and nothing else from Python's
package index, and imports nothing of this project.
"""
