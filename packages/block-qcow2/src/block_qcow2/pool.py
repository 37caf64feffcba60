"""A bounded pool of daemon threads for system calls that block. Not an executor: no futures, no results, no exceptions.

Threads start when work waits and none is free, and end after ten idle seconds or with close().
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

_IDLE_SECONDS = 10.0


class WorkerPool:
    """Runs callables on at most `limit` threads, first come, first served. Safe from any thread."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._unfinished = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` run soon. What it raises, which is a mistake, is told to threading.excepthook; the others go on."""
        with self._lock:
            self._unfinished += 1
            if len(self._threads) < min(self._unfinished, self._limit):
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the host has no thread to give; those that run take the work, or nobody does
                    if not self._threads:
                        self._unfinished -= 1
                        raise
                else:
                    self._threads.add(thread)
            self._queue.put(work)

    def close(self) -> None:
        """Finish the work that waits, then end every thread. No work may be submitted after it."""
        with self._lock:
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            try:
                work = self._queue.get(timeout=_IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if not self._queue.empty():
                        continue  # work came between the timeout and the lock
                    self._threads.discard(threading.current_thread())
                    return
            if work is None:
                return
            try:
                work()
            except Exception as mistake:
                threading.excepthook(
                    threading.ExceptHookArgs((type(mistake), mistake, mistake.__traceback__, threading.current_thread()))
                )
            finally:
                del work  # a request holds views of guest memory
                with self._lock:
                    self._unfinished -= 1
