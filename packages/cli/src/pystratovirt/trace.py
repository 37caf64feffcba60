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
    """A pattern, a file of patterns or a point that cannot be used; one line."""


class TracePoint(NamedTuple):
    """A name, and the methods it stands for: `module:Class.method`, or `module:function`.

    `?NAME` behind one means its calls with a request of that name only (`Request.name` of an ioctl or a message).
    """

    name: str
    targets: tuple[str, ...]


REGISTER_READS: Final = "virtio_tpt_read_config"
"""The point that sees nothing while guests read registers from memory."""

_DISK = "block_qcow2.qcow2.disk:Qcow2Channel"
_RAW = "block_qcow2.engines.threads:ThreadChannel"  # and the others, which inherit from it
_BLK = "virtio_devices.blk.device:BlkDevice"
_KVM = "vmm_core.hypervisor.kvm.vm:KvmHypervisor"
_IOCTL = "vmm_core.hypervisor.kvm.ioctl:call"
_VHOST_KERNEL = "virtio_devices.vhost_kernel:VhostKernel.ioctl"
_VHOST_USER = "virtio_devices.vhost_user.connection:Connection"

# KVM's names of what a vCPU is made of, where StratoVirt's differ.
_REGISTERS = {"debug_regs": "debugregs"} | {
    name: name for name in ("fpu", "lapic", "mp_state", "msrs", "regs", "sregs", "vcpu_events", "xcrs", "xsave")
}
_VHOST = (
    "get_features", "get_vring_base", "set_features", "set_mem_table", "set_owner", "set_vring_addr", "set_vring_base",
    "set_vring_call", "set_vring_kick", "set_vring_num",
)  # fmt: skip


def _by_message(request: str) -> tuple[str, str]:
    """Where a vhost-user back end is asked, with an answer and without."""
    return f"{_VHOST_USER}.call_with_fds?{request}", f"{_VHOST_USER}.tell?{request}"


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
        ("cpu_boot_config", "vmm_core.hypervisor.kvm.x86_64.vcpu:VcpuArch.load_boot"),
        ("kvm_add_ioeventfd", f"{_KVM}.add_ioeventfd"),
        ("kvm_commit_irq_routing", f"{_KVM}.route_message"),
        *((f"kvm_get_{name}", f"{_IOCTL}?KVM_GET_{kvm.upper()}") for name, kvm in _REGISTERS.items() if name != "xsave"),
        ("kvm_get_xsave", f"{_IOCTL}?KVM_GET_XSAVE", f"{_IOCTL}?KVM_GET_XSAVE2"),
        *((f"kvm_set_{name}", f"{_IOCTL}?KVM_SET_{kvm.upper()}") for name, kvm in _REGISTERS.items()),
        ("kvm_set_cpuid2", f"{_IOCTL}?KVM_SET_CPUID2"),
        ("kvm_setup_cpuid", f"{_IOCTL}?KVM_GET_SUPPORTED_CPUID"),
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
        ("rtc_inject_interrupt", "vmm_core.devices.rtc:Rtc._interrupt"),
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
        *((f"vhost_{name}", f"{_VHOST_KERNEL}?VHOST_{name.upper()}", *_by_message(name.upper())) for name in _VHOST),
        ("vhost_set_vring_enable", *_by_message("SET_VRING_ENABLE")),
        ("virtio_blk_complete_request", f"{_BLK}._completed"),
        ("virtio_blk_execute", f"{_BLK}._serve"),
        ("virtio_blk_handle_discard_write_zeroes_req", f"{_BLK}._other"),
        ("virtio_blk_process_queue_suppress_notify", f"{_BLK}._serve"),
        ("virtio_blk_read_config", f"{_BLK}.read_config"),
        ("virtio_blk_write_config", f"{_BLK}.write_config"),
        ("virtio_net_handle_ctrl", "virtio_devices.net.control:_Command.run"),
        ("virtio_rng_write_req_data", "virtio_devices.rng:RngDevice._read"),
        ("virtio_serial_output_data", "virtio_devices.console.port:ConsolePort.new_output"),
        ("virtio_serial_new_inputqueue_buf", "virtio_devices.console.port:ConsolePort.new_room"),
        (REGISTER_READS, "virtio_devices.mmio:MmioTransport.read"),
        ("virtio_tpt_write_config", "virtio_devices.mmio:MmioTransport.write"),
        ("virtqueue_add_used", *(f"virtio_devices.queue:SplitQueue.{verb}" for verb in ("add_used", "add_all_used"))),
        ("virtqueue_pop_avail", *(f"virtio_devices.queue:SplitQueue.{verb}" for verb in ("chains", "take_singles"))),
        ("virtqueue_send_interrupt", "virtio_devices.mmio:MmioTransport.queue_used"),
        ("virtqueue_set_avail_event", "virtio_devices.queue:SplitQueue.enable_kicks"),
        ("vm_state", *(f"vmm_core.machine.core:Machine.{verb}" for verb in ("start", "pause", "resume", "reset", "shutdown"))),
    )
)

_LONGEST_VALUE = 200  # characters
_FILE_MAX = 1 << 16  # bytes of a file of patterns
LONGEST_PATTERN: Final = 256  # characters
_PATTERN_MEMORY = 1 << 20  # bytes that a compiled pattern and its search may take


class Registry:
    """The trace points of one process and whether they are on. Safe to use from any thread."""

    def __init__(self, points: Iterable[TracePoint] = POINTS, write: Callable[[str], None] | None = None) -> None:
        """All points are off. `write` gets the lines; the log unless given."""
        self._points = {point.name: point for point in points}
        self._on: set[str] = set()
        self._watched: dict[str, _Watched] = {}  # by target, without a request
        self._write = write or log.trace
        self._lock = Lock()

    def states(self, pattern: str) -> list[tuple[str, bool]]:
        """Return name and state of each point whose name has a match of `pattern` anywhere. Raises TraceError."""
        found_in = _compile(pattern)
        return [(name, name in self._on) for name in self._points if found_in(name)]

    def is_on(self, name: str) -> bool:
        """Whether the point of this name is on."""
        return name in self._on

    def set_states(self, pattern: str, enable: bool) -> None:
        """Switch each point whose name has a match of `pattern` anywhere. No match is no error.

        Raises TraceError, and then has switched nothing.
        """
        found_in = _compile(pattern)
        with self._lock:
            points = [each for name, each in self._points.items() if found_in(name) and enable != (name in self._on)]
            # What can fail (a module that cannot be loaded, a method that is not there) comes before the first one is wrapped.
            self._watched |= self._unwatched(points)
            for point in points:
                self._switch(point, enable)

    def enable_from_file(self, path: str) -> None:
        """Switch on what the patterns in a file match, one a line; blank lines count for nothing. Raises TraceError."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(_FILE_MAX + 1)  # a device such as /dev/zero has no end
            if len(data) > _FILE_MAX:
                raise TraceError(f"{path}: more than {_FILE_MAX} bytes, which is no list of patterns")
            text = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    self.set_states(line.strip(), True)
                except TraceError as error:
                    raise TraceError(f"{path}: line {number}: {error}") from None

    def close(self) -> None:
        """Switch everything off."""
        self.set_states("", False)

    def _unwatched(self, points: Iterable[TracePoint]) -> dict[str, _Watched]:
        """Find the places of `points` that none stands for yet. Raises TraceError."""
        found: dict[str, _Watched] = {}
        for point in points:
            for place in (target.partition("?")[0] for target in point.targets):
                if place in self._watched or place in found:
                    continue
                try:
                    found[place] = _Watched(place, self._write)
                except Exception as error:  # loading a module may raise anything
                    reason = _one_line(f"{type(error).__name__}: {error}")
                    raise TraceError(f"{point.name} cannot be switched: {reason}") from None
        return found

    def _switch(self, point: TracePoint, enable: bool) -> None:
        for target in point.targets:
            place, _, request = target.partition("?")
            watched = self._watched[place]
            watched.switch(point.name, request, enable)
            if not watched.wanted:
                del self._watched[place]
        (self._on.add if enable else self._on.discard)(point.name)


class _Watched:
    """A method or function that points stand for: wrapped while any of them is on."""

    def __init__(self, place: str, write: Callable[[str], None]) -> None:
        self._owner, self._name = _find(place)
        self._write = write
        self._kept = vars(self._owner).get(self._name)  # None: inherited
        self._original = getattr(self._owner, self._name)
        code = self._original.__code__
        self._first = int(isinstance(self._owner, type))  # leaves out self
        self._names = code.co_varnames[self._first : code.co_argcount]
        self.wanted: tuple[tuple[str, str], ...] = ()  # (point, request); replaced and never changed, for other threads

    def switch(self, point: str, request: str, enable: bool) -> None:
        """Have calls write lines of `point`, or no longer."""
        before, each = self.wanted, (point, request)
        self.wanted = (*before, each) if enable else tuple(one for one in before if one != each)
        if enable and not before:
            setattr(self._owner, self._name, self._wrapper())
        elif not self.wanted and self._kept is not None:
            setattr(self._owner, self._name, self._kept)
        elif not self.wanted:
            delattr(self._owner, self._name)

    def _wrapper(self) -> Callable[..., Any]:
        original, write, first, names = self._original, self._write, self._first, self._names

        @functools.wraps(original)
        def traced(*args: Any, **options: Any) -> Any:
            shown = ""
            for point, request in self.wanted:
                if request and all(getattr(arg, "name", "") != request for arg in (*args[first:], *options.values())):
                    continue
                if not shown:
                    values = [*zip(names, args[first:], strict=False), *options.items()]
                    shown = " ".join(f"{key}={_show(value)}" for key, value in values)
                write(f"[{point}] {original.__qualname__} {shown}")
            return original(*args, **options)

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


def _find(target: str) -> tuple[Any, str]:
    """Return the class or module that a target is looked up in, and its name there."""
    module, _, path = target.partition("?")[0].partition(":")
    owner, _, method = path.rpartition(".")
    return (getattr(import_module(module), owner), method) if owner else (import_module(module), method)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if type(value).__name__ == "Request":  # of an ioctl or a message
        return str(value.name)
    if value is None or isinstance(value, bool | str | tuple | Struct):
        return repr(value)[:_LONGEST_VALUE]
    return f"<{type(value).__name__}>"


registry: Final = Registry()
"""The trace points of this process."""
