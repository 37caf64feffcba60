"""Which requests of a ring are under way at a back end that keeps no record of them itself.

A back end that answers out of order and dies leaves a ring from which nobody can tell what it was doing: where a request was
offered may have been written over since. Whoever looked at both rings often enough can. The ledger looks each time the back end
calls; when it is gone, the requests under way are offered once more, by putting them where its successor begins to read.

"INFLIGHT_SHMFD" of the specification does the same for back ends that have it, without a look per call. Without either, all that
can be said is whether answers came in order. Not here: packed rings.
"""

from __future__ import annotations

from virtio_devices.queue import SplitQueue
from vmm_core.guestmem import GuestMemory


class Ledger:
    """The record of one ring. Guest and back end write what it reads, so nothing in it is believed further than it is safe."""

    def __init__(self, queue: SplitQueue, memory: GuestMemory) -> None:
        """Begin with a ring whose back end starts where the used ring ends: everything available beyond is under way."""
        self._size = queue.size
        self._avail = memory.view(queue.avail, 6 + 2 * queue.size).cast("H")  # [flags, idx, ring..., used_event]
        self._used_idx = memory.view(queue.used, 4).cast("H")
        self._used = memory.view(queue.used + 4, 8 * queue.size).cast("Q")
        self._seen_avail = self._seen_used = self._used_idx[1]
        self._offered: dict[int, int] = {}  # head: how often it was offered and not given back; in order of the last offer
        self.exact = True  # nothing was missed

    def look(self) -> None:
        """Take in what both sides have done since the last look."""
        mask = self._size - 1
        used = self._used_idx[1]
        avail = self._avail[1]  # after the other index: what was given back had been offered before
        new_avail, new_used = (avail - self._seen_avail) & 0xFFFF, (used - self._seen_used) & 0xFFFF
        if new_avail > self._size or new_used > self._size:
            self.exact = False  # entries were written over before this look
            self._seen_avail, self._seen_used = avail, used
            self._offered.clear()
        else:
            offered = self._offered
            for at in range(self._seen_avail, self._seen_avail + new_avail):
                head = self._avail[2 + (at & mask)]
                offered[head] = offered.pop(head, 0) + 1
            for at in range(self._seen_used, self._seen_used + new_used):
                head = self._used[at & mask] & 0xFFFF_FFFF
                left = offered.get(head, 0) - 1
                if left > 0:
                    offered[head] = left
                else:
                    offered.pop(head, None)
            self._seen_avail, self._seen_used = avail, used
        if avail == used:
            # Nothing is under way, so nothing can be missing.
            self._offered.clear()
            self.exact = True

    def offer_again(self) -> bool:
        """Put what is under way behind the used index, where the next back end reads first. After the last one is gone.

        The driver does not read what it wrote there. Returns False, and changes nothing, when it is not known what is under way.
        """
        self.look()
        waiting = list(self._offered)
        if not self.exact or len(waiting) != (self._seen_avail - self._seen_used) & 0xFFFF:
            return False
        for number, head in enumerate(waiting):
            self._avail[2 + ((self._seen_used + number) & (self._size - 1))] = head
        return True


def answered_in_order(queue: SplitQueue, memory: GuestMemory) -> bool:
    """Tell whether a back end that is gone gave back in the order of offers, as far as both rings still show it.

    Then what it had under way lies between the two indices. Otherwise a successor that begins at the used index would carry out
    what is done, into memory that the guest uses for something else by now.
    """
    size, avail = queue.size, memory.view(queue.avail, 4 + 2 * queue.size).cast("H")
    used, index = memory.view(queue.used + 4, 8 * size).cast("Q"), memory.load(queue.used + 2, 2)
    under_way = (avail[1] - index) & 0xFFFF
    if under_way > size or len({avail[2 + at % size] for at in range(index, index + under_way)}) < under_way:
        return False  # one that came back early was offered again meanwhile
    shown = range(max(0, index - (size - under_way)), index)  # offers that were not written over; in the first lap, those made
    return all(avail[2 + at % size] == used[at % size] & 0xFFFF_FFFF for at in shown)
