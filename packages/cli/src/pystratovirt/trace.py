"""Trace points: named places in the program that write a log line each time they are passed, while they are switched on.

A point that is off costs nothing, because it is not there: switching it on wraps the methods that it stands for, switching it off
puts the originals back. So a point can only stand for methods that are looked up when they are called: one that somebody keeps
bound (a callback of a loop) would not fire. Names are StratoVirt's where the same thing happens here (reference command-line,
section 11).

Lines have the level TRACE, as in StratoVirt: STRATOVIRT_LOG_LEVEL=trace shows them.

Not here: QMP (`qmp_handlers.debug`), and where log lines go (`log`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

from pystratovirt import log
from qmp_protocol.schema import Struct


class TraceError(ValueError):
    """A pattern or a file of patterns that cannot be used; one line."""


class TracePoint(NamedTuple):
    """A name, and the methods it stands for: `module:Class.method`."""

    name: str
    targets: tuple[str, ...]


_DISK = "block_qcow2.qcow2.disk:Qcow2Channel"
_RAW = "block_qcow2.engines.threads:ThreadChannel"  # and the others, which inherit from it
_BLK = "virtio_devices.blk.device:BlkDevice"
_KVM = "vmm_core.hypervisor.kvm.vm:KvmHypervisor"

POINTS: Final = tuple(
    TracePoint(name, tuple(targets))
    for name, *targets in (
        ("aio_submit_request", f"{_RAW}._run", "block_qcow2.engines.ring:RingChannel._enqueue"),
        ("block_datasync", "block_qcow2.hostfile:HostFile.flush"),
        ("block_discard", f"{_RAW}.discard", f"{_DISK}.discard"),
        ("block_drain_request", f"{_RAW}.drain", f"{_DISK}.drain"),
        ("block_flush_request", f"{_RAW}.flush", f"{_DISK}.flush"),
        ("block_read_vectored", f"{_RAW}.readv", f"{_DISK}.readv"),
        ("block_write_vectored", f"{_RAW}.writev", f"{_DISK}.writev"),
        ("block_write_zeroes", f"{_RAW}.write_zeroes", f"{_DISK}.write_zeroes"),
        ("kvm_add_ioeventfd", f"{_KVM}.add_ioeventfd"),
        ("kvm_commit_irq_routing", f"{_KVM}.route_message"),
        ("kvm_delete_ioeventfd", f"{_KVM}.remove_ioeventfd"),
        ("kvm_register_irqfd", f"{_KVM}.interrupt_line"),
        ("kvm_release_irq", f"{_KVM}.unroute_message"),
        ("kvm_reset_vcpu", "vmm_core.hypervisor.kvm.vcpu:KvmVcpu.reset"),
        ("kvm_trigger_irqfd", "vmm_core.hypervisor.kvm.line:IrqfdLine.trigger"),
        ("kvm_unregister_irqfd", "vmm_core.hypervisor.kvm.line:IrqfdLine.close"),
        ("mmio_replaceable_config", "pystratovirt.hotplug:HotPlug.plug"),
        ("qcow2_flush", "block_qcow2.qcow2.image:Qcow2Image.flush"),
        ("qmp_command", "qmp_server.dispatch:Dispatcher.answer"),
        ("qmp_event", "qmp_server.server:QmpServer.emit"),
        ("rtc_read", "vmm_core.devices.rtc:Rtc.read"),
        ("rtc_write", "vmm_core.devices.rtc:Rtc.write"),
        ("serial_read", "vmm_core.devices.serial:Serial.read"),
        ("serial_receive", "vmm_core.devices.serial:Serial.receive"),
        ("serial_update_iir", "vmm_core.devices.serial:Serial._update"),
        ("serial_write", "vmm_core.devices.serial:Serial.write"),
        ("thread_pool_spawn_thread", "block_qcow2.pool:WorkerPool._run"),
        ("thread_pool_submit_task", "block_qcow2.pool:WorkerPool.submit"),
        ("timer_add", "vmm_core.clock:TimerQueue.add"),
        ("timer_del", "vmm_core.clock:TimerQueue.cancel"),
        ("timer_run", "vmm_core.epoll:EpollLoop._run_timers"),
        ("update_event", *(f"vmm_core.epoll:EpollLoop.{verb}_fd" for verb in ("add", "modify", "_forget"))),
        ("virtio_blk_complete_request", f"{_BLK}._completed"),
        ("virtio_blk_handle_discard_write_zeroes_req", f"{_BLK}._other"),
        ("virtio_blk_process_queue_suppress_notify", f"{_BLK}._serve"),
        ("virtio_blk_read_config", f"{_BLK}.read_config"),
        ("virtio_blk_write_config", f"{_BLK}.write_config"),
        ("virtio_net_handle_ctrl", "virtio_devices.net.control:_Command.run"),
        ("virtio_rng_write_req_data", "virtio_devices.rng:RngDevice._read"),
        ("virtio_serial_output_data", "virtio_devices.console.port:ConsolePort.new_output"),
        ("virtio_serial_new_inputqueue_buf", "virtio_devices.console.port:ConsolePort.new_room"),
        ("virtio_tpt_read_config", "virtio_devices.mmio:MmioTransport.read"),
        ("virtio_tpt_write_config", "virtio_devices.mmio:MmioTransport.write"),
        ("virtqueue_add_used", "virtio_devices.queue:SplitQueue.add_used"),
        ("virtqueue_pop_avail", "virtio_devices.queue:SplitQueue.chains"),
        ("virtqueue_send_interrupt", "virtio_devices.mmio:MmioTransport.queue_used"),
        ("virtqueue_set_avail_event", "virtio_devices.queue:SplitQueue.enable_kicks"),
        ("vm_state", *(f"vmm_core.machine.core:Machine.{verb}" for verb in ("start", "pause", "resume", "reset", "shutdown"))),
    )
)

_LONGEST_VALUE = 200  # characters
LONGEST_PATTERN: Final = 256  # characters
_PATTERN_MEMORY = 1 << 20  # bytes that a compiled pattern and its search may take


class Registry:
    """The trace points of one process and whether they are on. Safe to use from any thread."""

    def __init__(self, points: Iterable[TracePoint] = POINTS, write: Callable[[str], None] | None = None) -> None:
        """All points are off. `write` gets the lines; the log unless given."""
        self._points = {point.name: point for point in points}
        self._originals: dict[str, list[tuple[type, str, Any]]] = {}
        self._write = write or log.trace
        self._lock = Lock()

    def states(self, pattern: str) -> list[tuple[str, bool]]:
        """Return name and state of each point whose name has a match of `pattern` anywhere. Raises TraceError."""
        found_in = _compile(pattern)
        return [(name, name in self._originals) for name in self._points if found_in(name)]

    def set_states(self, pattern: str, enable: bool) -> None:
        """Switch each point whose name has a match of `pattern` anywhere. No match is no error. Raises TraceError."""
        found_in = _compile(pattern)
        with self._lock:
            for name, point in self._points.items():
                if found_in(name):
                    self._switch(point, enable)

    def enable_from_file(self, path: str) -> None:
        """Switch on what the patterns in a file match, one a line; blank lines count for nothing. Raises TraceError."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    self.set_states(line.strip(), True)
                except TraceError as error:
                    raise TraceError(f"{path}: line {number}: {error}") from None

    def close(self) -> None:
        """Switch everything off."""
        self.set_states("", False)

    def _switch(self, point: TracePoint, enable: bool) -> None:
        if enable == (point.name in self._originals):
            return
        if not enable:
            for owner, method, original in self._originals.pop(point.name):
                if original is None:  # inherited
                    delattr(owner, method)
                else:
                    setattr(owner, method, original)
            return
        replaced = []
        for target in point.targets:
            owner, method = _find(target)
            replaced.append((owner, method, owner.__dict__.get(method)))
            setattr(owner, method, self._wrap(point.name, getattr(owner, method)))
        self._originals[point.name] = replaced

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        write = self._write
        code = original.__code__
        names = code.co_varnames[1 : code.co_argcount]

        @functools.wraps(original)
        def traced(self: Any, *args: Any, **options: Any) -> Any:
            values = [*zip(names, args, strict=False), *options.items()]
            write(f"[{name}] {original.__qualname__} " + " ".join(f"{key}={_show(value)}" for key, value in values))
            return original(self, *args, **options)

        return traced


def _compile(text: str) -> Callable[[str], object]:
    """Return what tells whether a name has a match of the pattern `text`, anywhere in it.

    Patterns come from clients and are tried on the main loop, so they need an engine whose time grows no faster than pattern and
    name, with a bound on memory. RE2's syntax is that of StratoVirt's engine. Raises TraceError.
    """
    import re2  # type: ignore[import-untyped]  # when the first pattern comes

    if len(text) > LONGEST_PATTERN:
        raise TraceError(f"no regular expression: at most {LONGEST_PATTERN} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _PATTERN_MEMORY
    try:
        return re2.compile(text, options=options).search  # type: ignore[no-any-return]
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0] if isinstance(error, re2.error) else "not text"
        raise TraceError(f"no regular expression: {_one_line(reason)}") from None


def _one_line(reason: str | bytes) -> str:
    text = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _find(target: str) -> tuple[type, str]:
    module, _, path = target.partition(":")
    owner, _, method = path.partition(".")
    return getattr(import_module(module), owner), method


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if value is None or isinstance(value, bool | str | tuple | Struct):
        return repr(value)[:_LONGEST_VALUE]
    return f"<{type(value).__name__}>"


registry: Final = Registry()
"""The trace points of this process."""
