"""A sampler's lanes, which take parts of payloads side by side."""

from sampler_service import lane
from service_common import staging
from service_common.children import Child, Children, suitable
from tinkerbell.payload import PayloadError
from tinkerbell.v1 import sampler_pb2

# With more of them, what they share with each other is what takes the time.
_MOST = 4


class Lanes(Children[Child]):
    """Those of one sampler; none where there are too few cores for two."""

    def __init__(self, host: str, count: int | None = None):
        """`host`: to listen on, at ports that the system chooses. `count`: None for what suits the cores."""
        if count is None:
            count = suitable(_MOST)
        super().__init__([Child(lane.__name__, f"{host}:0") for _ in range(count if count > 1 else 0)])

    def ports(self) -> list[int]:
        """Of those that serve now."""
        return [each.port for each in self.running()]

    def read(self, part: sampler_pb2.PushPart, target: memoryview) -> None:
        """Fills `target` with a part that a lane has. PayloadError when it does not have it. For any thread."""
        pids = {each.port: each.pid for each in self._children}
        try:
            staging.read(pids[part.lane_port], part.part_id, target)
        except (KeyError, OSError) as cause:
            raise PayloadError(f"the lane at port {part.lane_port} has no part {part.part_id}: {cause!r}") from cause
