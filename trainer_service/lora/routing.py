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

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()

    @contextlib.contextmanager
    def use(self, segments: Sequence[Segment]) -> Iterator[None]:
        """For the passes inside the `with` block; `segments` cover all packed tokens in order."""
        self.segments = segments
        try:
            yield
        finally:
            self.segments = ()
