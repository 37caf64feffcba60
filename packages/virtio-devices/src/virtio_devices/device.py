"""What every virtio device is: features, configuration space, queues on loops, and a life between reset and DRIVER_OK.

A device does not know its transport: it is given enabled queues and their kick descriptors, and a `Notifier` to speak through.
Life-cycle methods come from vCPU threads (the driver writes a status) and from the thread that owns the machine; they exclude
each other here. Everything else a device does happens on the loops that own its queues, and takes no lock of this class.

Not here: registers, interrupts (`mmio`), rings (`queue`), and what a request means (a module a device).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.errors import StateError, VmmError
from vmm_core.loop import READ, Loop
from vmm_core.state import State, expect, versioned

# Feature bits that every device shares (virtio 1.2, section 6), as masks.
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32


class DeviceError(VmmError):
    """A device cannot do what its owner asked for, or cannot start; the message names the device and the reason."""


class Notifier(Protocol):
    """How a device reaches its driver. From any thread; never blocks, never raises, and takes no lock of the device."""

    def queue_used(self, index: int) -> None:
        """Send a used buffer notification for queue `index` (2.3)."""
        ...

    def used_fd(self, index: int) -> int:
        """Return the event descriptor that does the same when 1 is added to it, for who serves a queue outside of this process.

        The transport's; valid until the device is reset. For `_start()` of a device.
        """
        ...

    def config_changed(self) -> None:
        """Send a configuration change notification (2.3), if the driver is ready for one."""
        ...

    def show_config(self, generation: int, config: bytes) -> None:
        """Take note of another configuration space, before the driver is told."""
        ...

    def show_features(self) -> None:
        """Take note of other features. A driver is not told: those that it has negotiated stay."""
        ...

    def needs_reset(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET (2.1.2). `reason` is for people."""
        ...


@versioned(1)
class DeviceState(NamedTuple):
    """Saved state of a device that has none beyond its transport's."""

    device_type: int


class VirtioDevice:
    """Base class of all devices. Subclasses fill in the methods under "For subclasses" and nothing else of this class.

    `device_type` is the device ID of section 5; `features` what is offered; `queue_sizes` the largest size of each queue.
    """

    device_type: int = 0

    def __init__(
        self, name: str, loops: Sequence[Loop], *, features: int, queue_sizes: Sequence[int], config: bytes = b""
    ) -> None:
        """Make an inactive device. Queue n is owned by loop n modulo the number of `loops`; `name` is for messages."""
        if not loops:
            raise ValueError(f"{name}: a device needs a loop")
        self.name = name
        self._features = features | F_VERSION_1
        self.queue_sizes = tuple(queue_sizes)
        self.active = False
        self.broken = False
        self.negotiated = 0
        self.queues: list[SplitQueue | None] = [None] * len(self.queue_sizes)
        self._loops = [loops[index % len(loops)] for index in range(len(self.queue_sizes))]
        # Queues that no loop of ours may touch, because somebody else serves them (vhost). Set in _start().
        self.handed_over: frozenset[int] = frozenset()
        self._kicks: Sequence[int] = ()
        self._notifier: Notifier | None = None
        self._lock = threading.RLock()  # life cycle; held while waiting for loops, so never taken on one
        self._running = False  # loops may work on queues
        self._restless = False  # the last attempt to come to rest has failed
        self._paused = False
        # Replaced as one, so that a reader on any thread sees bytes and generation that belong together (2.5.1).
        self._config = (0, config)
        self._config_lock = threading.Lock()  # of writers

    @property
    def features(self) -> int:
        """What is offered; it may change with what the device is attached to."""
        return self._features

    @features.setter
    def features(self, features: int) -> None:
        self._features = features
        if self._notifier is not None:
            self._notifier.show_features()

    # Configuration space (2.5), from any thread

    @property
    def config_generation(self) -> int:
        """A number that changes whenever the device changes its configuration space."""
        return self._config[0]

    def read_config(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset`, little-endian; zero beyond the end."""
        return int.from_bytes(self._config[1][offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take a driver's write. Ignored unless a device has writable fields."""

    def accepts(self, features: int) -> bool:
        """Tell whether the driver's choice `features`, all of them offered, fits together (2.2.2)."""
        return True

    def counters(self) -> dict[str, int]:
        """Return what the device has counted since it was made, by name; nothing where the kernel serves its queues.

        On any thread. Frames, packets and bytes are `rx` towards the guest and `tx` from it.
        """
        return {}

    # Life cycle

    def connect(self, notifier: Notifier) -> None:
        """Give the device its transport. Once, before everything else."""
        self._notifier = notifier

    def activate(self, features: int, queues: Sequence[SplitQueue | None], kicks: Sequence[int]) -> None:
        """Go live with the negotiated `features` (DRIVER_OK). Queues that the driver did not enable are None.

        `kicks` are event descriptors, one a queue, which the transport owns. A paused device starts working at resume().

        Raises VmmError or OSError when a back end cannot be started; the device is inactive then.
        """
        with self._lock:
            if self.active:
                raise ValueError(f"{self.name}: active already")
            self.negotiated, self.queues, self._kicks = features, list(queues), tuple(kicks)
            self.broken = False
            self.active = True
            try:
                self._start()
                if not self._paused:
                    self._go()
            except BaseException:
                self.reset()
                raise

    def reset(self) -> None:
        """Forget the driver. When this returns, no guest memory is touched any more; requests under way are waited for."""
        with self._lock:
            if not self.active:
                return
            if self._running or self._restless:
                self._halt()
            self._stop()
            self.handed_over = frozenset()
            self.active = self.broken = False
            self.negotiated = 0
            self.queues = [None] * len(self.queue_sizes)

    def stop_queue(self, index: int) -> None:
        """Stop using one queue (QueueReady written 0 on a live device). When this returns its rings are not touched any more."""
        with self._lock:
            if not self.active or self.queues[index] is None:
                return
            loop = self._loops[index]

            def stop() -> None:
                if self._running:
                    loop.remove_fd(self._kicks[index])
                self._drain(loop)
                self.queues[index] = None

            loop.run(stop)

    def pause(self) -> None:
        """Finish what is under way and start nothing new. When this returns, guest memory and indices are at rest.

        Raises what a back end raised that could not come to rest; the device works on then.
        """
        with self._lock:
            self._paused = True
            if self._running:
                try:
                    self._halt()
                except BaseException:
                    self.resume()
                    raise

    def resume(self) -> None:
        """Go on after pause(), with what the driver made available meanwhile. When it raises, the device is still at rest."""
        with self._lock:
            if self.active and not self._running:
                self._go()
            self._paused = False

    def close(self) -> None:
        """Reset, and give back what the device holds of the host. Twice is fine."""
        self.reset()

    def save(self) -> State:
        """Return the device's state beyond features, queues and status, which its transport saves. While paused."""
        return DeviceState(self.device_type)

    def restore(self, state: Any) -> None:
        """Put back a saved state, before or after the transport's. Raises StateError when it does not fit."""
        if expect(state, DeviceState, self.name).device_type != self.device_type:
            raise StateError(f"{self.name}: state of device type {state.device_type}, not {self.device_type}")

    # For subclasses

    def _start(self) -> None:
        """Prepare for work: back ends, watches. On the activating thread; queues and features are set."""

    def _process(self, index: int, queue: SplitQueue) -> None:
        """Serve what is available in a queue. On its loop; a QueueError raised here breaks the device.

        A device that offers F_EVENT_IDX ends with `enable_kicks()` and goes on while that says so: without it no kick follows.
        """
        raise NotImplementedError

    def _drain(self, loop: Loop) -> None:
        """Wait until nothing of the queues of `loop` is under way. On that loop; may block it."""

    def _stop(self) -> None:
        """Undo _start(). On the resetting thread; every loop is at rest."""

    def _used(self, index: int, queue: SplitQueue) -> None:
        """Publish what was given back on a queue, and notify the driver if it wants that. On the queue's loop."""
        if queue.publish() and self._notifier is not None:
            self._notifier.queue_used(index)

    def _set_config(self, offset: int, data: bytes) -> None:
        """Change configuration space from the device's side and tell the driver. From any thread."""
        self._patch_config(offset, data, 1)
        if self._notifier is not None:
            self._notifier.config_changed()

    def _patch_config(self, offset: int, data: bytes, generations: int = 0) -> None:
        """Change configuration space without telling the driver, as its own writes do."""
        with self._config_lock:
            generation, config = self._config
            changed = config[:offset] + data + config[offset + len(data) :]
            self._config = ((generation + generations) & 0xFFFF_FFFF, changed)
            if self._notifier is not None:
                self._notifier.show_config(*self._config)

    def show_config(self) -> None:
        """Have the transport take note of the configuration space."""
        with self._config_lock:
            if self._notifier is not None:
                self._notifier.show_config(*self._config)

    def _break(self, reason: str) -> None:
        """Give up on this driver until it resets the device. On a loop."""
        self.broken = True
        if self._notifier is not None:
            self._notifier.needs_reset(f"{self.name}: {reason}")

    def _guarded(self, index: int, work: Callable[[int, SplitQueue], None]) -> None:
        """Run `work` on a queue if the device may work now; a broken rule of the ring breaks the device. On the queue's loop."""
        queue = self.queues[index]
        if queue is None or self.broken or not self._running:
            return
        try:
            work(index, queue)
        except QueueError as error:
            self._break(f"queue {index}: {error}")

    def _kick_later(self, index: int) -> None:
        """Have _process() called again after other descriptors of the loop had their turn."""
        os.eventfd_write(self._kicks[index], 1)

    def _owned(self) -> dict[Loop, list[int]]:
        """Return the enabled queues that loops serve, by loop."""
        owned: dict[Loop, list[int]] = {}
        for index, queue in enumerate(self.queues):
            if queue is not None and index not in self.handed_over:
                owned.setdefault(self._loops[index], []).append(index)
        return owned

    def _go(self) -> None:
        """Have every loop work on its queues, or none."""
        self._running = True
        try:
            for loop, indices in self._owned().items():
                for index in indices:
                    loop.add_fd(self._kicks[index], READ, self._kicked(index))
                    # What was offered before nobody watched, or before the state was saved, has no kick of its own.
                    self._kick_later(index)
        except BaseException:
            self._halt()
            raise

    def _halt(self) -> None:
        """Have every loop come to rest; what one of them raises, the others do not suffer from."""
        self._running = False
        failure: Exception | None = None
        for loop, indices in self._owned().items():

            def rest(loop: Loop = loop, indices: list[int] = indices) -> None:
                for index in indices:
                    loop.remove_fd(self._kicks[index])
                self._drain(loop)

            try:
                loop.run(rest)
            except Exception as error:
                failure = failure or error
        self._restless = failure is not None
        if failure is not None:
            raise failure

    def _kicked(self, index: int) -> Callable[[int], None]:
        kick, guarded, process = self._kicks[index], self._guarded, self._process
        read = os.eventfd_read

        def kicked(_events: int) -> None:
            try:
                read(kick)
            except BlockingIOError:
                return
            guarded(index, process)

        return kicked
