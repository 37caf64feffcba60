"""Everything StratoVirt 2.4.0 knows by name and this program does not do yet. Read for refusals and the documentation only."""

from __future__ import annotations

_PCI = "machines with a PCI bus"

OBJECTS = {
    "tls-creds-x509": "certificates for VNC",
    "authz-simple": "user names for VNC",
}

DRIVERS = {
    "virtio-blk-pci": _PCI,
    "virtio-scsi-pci": _PCI,
    "scsi-hd": _PCI,
    "scsi-cd": _PCI,
    "virtio-net-pci": _PCI,
    "pcie-root-port": _PCI,
    "vhost-vsock-pci": _PCI,
    "virtio-balloon-pci": _PCI,
    "virtio-serial-pci": _PCI,
    "virtio-rng-pci": _PCI,
    "vfio-pci": _PCI,
    "vhost-user-blk-pci": _PCI,
    "vhost-user-fs-pci": _PCI,
    "nec-usb-xhci": _PCI,
    "usb-kbd": _PCI,
    "usb-tablet": _PCI,
    "usb-storage": _PCI,
    "usb-camera": f"{_PCI}; an optional feature of StratoVirt",
    "usb-host": f"{_PCI}; an optional feature of StratoVirt",
    "virtio-gpu-pci": f"{_PCI}; an optional feature of StratoVirt",
    "ramfb": "virt with firmware; an optional feature of StratoVirt",
    "pvpanic": f"{_PCI}; an optional feature of StratoVirt",
    "ivshmem-scream": f"{_PCI}; an optional feature of StratoVirt",
    "pcie-demo-dev": f"{_PCI}; an optional feature of StratoVirt",
}
