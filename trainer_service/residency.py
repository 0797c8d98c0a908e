"""Which adapters are in the device's memory: those used last. The others wait in host memory."""

from collections import OrderedDict
from collections.abc import Sequence

from trainer_service.lora.arena import Arena


class Residency:
    """Keeps at most `limit` arenas on the device, least recently used first to go.

    A pass that needs more than that many adapters at once gets them all; the surplus goes when the next one comes.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._resident: OrderedDict[int, Arena] = OrderedDict()

    def use(self, arenas: Sequence[Arena]) -> None:
        """Brings the arenas to the device, if they are not there, and marks them as used."""
        for arena in arenas:
            if arena.resident:
                self._resident.move_to_end(id(arena))
        for arena in arenas:
            if not arena.resident:
                self.make_room(kept=arenas)
                arena.restore()
                self._resident[id(arena)] = arena

    def add(self, arena: Arena) -> None:
        """Takes a new arena, which is on the device."""
        self._resident[id(arena)] = arena

    def remove(self, arena: Arena) -> None:
        """Forgets an arena."""
        self._resident.pop(id(arena), None)

    def make_room(self, kept: Sequence[Arena] = ()) -> None:
        """Spills as many arenas as it takes to make one more fit, but none of `kept`."""
        protected = {id(arena) for arena in kept}
        for key in [key for key in self._resident if key not in protected]:
            if len(self._resident) < self._limit:
                return
            self._resident[key].spill()
            del self._resident[key]
