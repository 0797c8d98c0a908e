"""How ranks share a model, and this rank's place among them."""

from dataclasses import dataclass
from typing import Any

from service_common import errors


@dataclass(frozen=True)
class Layout:
    """What the operator chooses; the rest of the world's ranks hold copies of the model (data parallelism)."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    def data(self, world_size: int) -> int:
        """Copies of the model. INVALID_ARGUMENT when the ranks cannot be divided so."""
        model = self.tensor * self.pipeline
        if world_size % model:
            raise errors.invalid_argument(
                "LAYOUT_INVALID",
                f"{world_size} ranks cannot hold copies of a model that takes {self.tensor} x {self.pipeline}",
                field="world_size",
                world_size=world_size,
            )
        return world_size // model


@dataclass(frozen=True)
class Axis:
    """One dimension of the layout: this rank is the `index`th of `size` in `group`."""

    index: int = 0
    size: int = 1
    group: Any = None  # torch.distributed.ProcessGroup
    ranks: tuple[int, ...] = (0,)  # the group's, by their number in the world

    @property
    def is_first(self) -> bool:
        """Whether none comes before."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether none comes after."""
        return self.index == self.size - 1

    @property
    def previous(self) -> int:
        """The world's number of the rank before."""
        return self.ranks[self.index - 1]

    @property
    def next(self) -> int:
        """The world's number of the rank after."""
        return self.ranks[self.index + 1]


@dataclass(frozen=True)
class Place:
    """This rank's place on every axis. Ranks of one `model` axis hold the model once together."""

    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data: Axis = Axis()
    model: Axis = Axis()
    sequence_parallel: bool = False
    world: Any = None  # a gloo group of all ranks, for objects on the CPU; None when there is one rank
