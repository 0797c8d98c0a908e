"""Which packed tokens belong to which adapter."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer_service.lora.arena import Arena


@dataclass(frozen=True)
class Segment:
    """A stretch of packed tokens of one adapter; `arena` None for the bare base model."""

    arena: Arena | None
    num_tokens: int


class Routing:
    """Tells all adapted layers of a model how the tokens of the current pass belong to adapters."""

    def __init__(self, index: int = 0, parts: int = 1) -> None:
        """With sequence parallelism this rank's tokens outside attention and MLP are the `index`th of `parts` equal
        stretches of all tokens.
        """
        self._index = index
        self.parts = parts
        self.segments: Sequence[Segment] = ()
        self.local_segments: Sequence[Segment] = ()

    @contextlib.contextmanager
    def use(self, segments: Sequence[Segment]) -> Iterator[None]:
        """For the passes inside the `with` block; `segments` cover all packed tokens in order."""
        self.segments = segments
        self.local_segments = segments if self.parts == 1 else self._cut(segments)
        try:
            yield
        finally:
            self.segments = self.local_segments = ()

    def _cut(self, segments: Sequence[Segment]) -> list[Segment]:
        length = sum(segment.num_tokens for segment in segments) // self.parts
        first, last = self._index * length, (self._index + 1) * length
        local = []
        start = 0
        for segment in segments:
            end = start + segment.num_tokens
            num_tokens = min(end, last) - max(start, first)
            if num_tokens > 0:
                local.append(Segment(segment.arena, num_tokens))
            start = end
        return local
