"""Which packed tokens belong to which adapter."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from trainer_service.lora.products import Batch, Segment, no_adapters


class Routing:
    """Tells all adapted layers of a model how the tokens of the current pass belong to adapters."""

    def __init__(self, batch: Callable[[Sequence[Segment]], Batch], index: int = 0, parts: int = 1) -> None:
        """`batch` turns segments, which cover all packed tokens in order, into products.

        With sequence parallelism this rank's tokens outside attention and MLP are the `index`th of `parts` equal
        stretches of all tokens.
        """
        self._batch = batch
        self._index = index
        self.parts = parts
        self.whole: Batch = no_adapters
        self.local: Batch = no_adapters

    @contextlib.contextmanager
    def use(self, segments: Sequence[Segment]) -> Iterator[None]:
        """For the passes inside the `with` block."""
        whole = self._batch(segments)
        with self.using(whole, whole if self.parts == 1 else self._batch(self._cut(segments))):
            yield

    @contextlib.contextmanager
    def using(self, whole: Batch, local: Batch) -> Iterator[None]:
        """As `use`, with products that are there already: of all tokens, and of this rank's outside attention."""
        before = self.whole, self.local
        self.whole, self.local = whole, local
        try:
            yield
        finally:
            self.whole, self.local = before

    def _cut(self, segments: Sequence[Segment]) -> list[Segment]:
        """Of each segment this rank's tokens, which may be none: x A^T is equally wide on all ranks."""
        length = sum(segment.num_tokens for segment in segments) // self.parts
        first, last = self._index * length, (self._index + 1) * length
        local = []
        start = 0
        for segment in segments:
            end = start + segment.num_tokens
            local.append(Segment(segment.arena, max(0, min(end, last) - max(start, first))))
            start = end
        return local
