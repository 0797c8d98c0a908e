"""Training examples: checked against the model, then packed without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from service_common import errors


@dataclass(frozen=True)
class Datum:
    """One sequence of N tokens."""

    tokens: np.ndarray  # int64 [N]
    target_tokens: np.ndarray  # int64 [N]
    weights: np.ndarray  # float32 [N]


def check(data: Sequence[Datum], vocab_size: int, max_sequence_length: int, max_tokens: int) -> None:
    """INVALID_ARGUMENT, naming datum and position, on what the model cannot compute."""
    if not data:
        raise errors.invalid_argument("BATCH_EMPTY", "data is empty; send at least one datum", field="data")
    for index, datum in enumerate(data):
        field = f"data[{index}]"
        length = len(datum.tokens)
        if not 1 <= length <= max_sequence_length:
            raise errors.invalid_argument(
                "SEQUENCE_LENGTH_OUT_OF_RANGE",
                f"{field} has {length} tokens; from 1 to {max_sequence_length} are possible",
                field=f"{field}.tokens",
                length=length,
                max_sequence_length=max_sequence_length,
            )
        for name in ("target_tokens", "weights"):
            array = getattr(datum, name)
            if array.shape != (length,):
                raise errors.invalid_argument(
                    "LENGTH_MISMATCH",
                    f"{field} has {length} tokens, and its {name} have shape {list(array.shape)}; "
                    f"they must have shape [{length}]",
                    field=f"{field}.loss_inputs[{name}]",
                    length=length,
                )
        for name in ("tokens", "target_tokens"):
            array = getattr(datum, name)
            bad = np.flatnonzero((array < 0) | (array >= vocab_size))
            if bad.size:
                raise errors.invalid_argument(
                    "TOKEN_OUT_OF_RANGE",
                    f"{field}.{name}[{bad[0]}] is {array[bad[0]]}; token ids go from 0 to {vocab_size - 1}",
                    field=f"{field}.{name}",
                    token=array[bad[0]],
                    vocab_size=vocab_size,
                )
        if not np.isfinite(datum.weights).all():
            position = int(np.flatnonzero(~np.isfinite(datum.weights))[0])
            raise errors.invalid_argument(
                "WEIGHT_NOT_FINITE",
                f"{field}.weights[{position}] is {datum.weights[position]}",
                field=f"{field}.loss_inputs[weights]",
            )
    total = sum(len(datum.tokens) for datum in data)
    if total > max_tokens:
        raise errors.invalid_argument(
            "BATCH_TOO_LARGE",
            f"the request has {total} tokens, and at most {max_tokens} are possible; send several and step once",
            field="data",
            tokens=total,
            max_batch_tokens=max_tokens,
        )


def microbatches(data: Sequence[Datum], max_tokens: int) -> Iterator[list[Datum]]:
    """Cuts the batch, in order, into passes of at most `max_tokens`; a longer sequence gets a pass of its own."""
    batch: list[Datum] = []
    tokens = 0
    for datum in data:
        if batch and tokens + len(datum.tokens) > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(datum)
        tokens += len(datum.tokens)
    if batch:
        yield batch
