"""qcow2 and raw disk images as a library and as the command stratovirt-img."""
