"""Training examples, checked against the model before anything computes with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service_common import errors
from trainer_service.losses import INPUT_DEFAULTS, INPUTS, Loss


@dataclass(frozen=True)
class Datum:
    """One sequence of N tokens."""

    tokens: np.ndarray  # int64 [N]
    target_tokens: np.ndarray  # int64 [N]
    inputs: Mapping[str, np.ndarray]  # float32 [N] each: what losses.INPUTS names for the loss

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


def scored(tokens: Sequence[int], field: str) -> Datum:
    """The datum that gives the log-probability of each token but the first. INVALID_ARGUMENT below 2 tokens."""
    if len(tokens) < 2:
        raise errors.invalid_argument(
            "SEQUENCE_TOO_SHORT", f"{field} has {len(tokens)} tokens, and needs at least 2", field=f"{field}.tokens"
        )
    array = np.asarray(tokens, np.int64)
    return Datum(array[:-1], array[1:], {"weights": np.ones(len(array) - 1, np.float32)})


def num_tokens(data: Sequence[Datum]) -> int:
    """Tokens of all data together."""
    return sum(len(datum) for datum in data)


def check(data: Sequence[Datum], loss: Loss, vocab_size: int, max_sequence_length: int, max_tokens: int) -> None:
    """INVALID_ARGUMENT, naming datum and position, on what the model cannot compute."""
    if not data:
        raise errors.invalid_argument("BATCH_EMPTY", "data is empty; send at least one datum", field="data")
    for index, datum in enumerate(data):
        _check_datum(datum, f"data[{index}]", loss, vocab_size, max_sequence_length)
    total = num_tokens(data)
    if total > max_tokens:
        raise errors.invalid_argument(
            "BATCH_TOO_LARGE",
            f"the request has {total} tokens, and at most {max_tokens} are possible; send several and step once",
            field="data",
            tokens=total,
            max_batch_tokens=max_tokens,
        )


def _check_datum(datum: Datum, field: str, loss: Loss, vocab_size: int, max_sequence_length: int) -> None:
    length = len(datum.tokens)
    if not 1 <= length <= max_sequence_length:
        raise errors.invalid_argument(
            "SEQUENCE_LENGTH_OUT_OF_RANGE",
            f"{field} has {length} tokens; from 1 to {max_sequence_length} are possible",
            field=f"{field}.tokens",
            length=length,
            max_sequence_length=max_sequence_length,
        )
    _check_names(datum, field, loss)
    for name, array in (("target_tokens", datum.target_tokens), *datum.inputs.items()):
        if array.shape != (length,):
            raise errors.invalid_argument(
                "LENGTH_MISMATCH",
                f"{field} has {length} tokens, and its {name} have shape {list(array.shape)}; "
                f"they must have shape [{length}]",
                field=f"{field}.loss_inputs[{name}]",
                length=length,
            )
    _check_finite(datum, field, loss)
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


def _check_names(datum: Datum, field: str, loss: Loss) -> None:
    possible = set(INPUTS[loss])
    required = possible - set(INPUT_DEFAULTS)
    given = set(datum.inputs)
    if not required <= given <= possible:
        raise errors.invalid_argument(
            "LOSS_INPUTS_INVALID",
            f"{loss.value} takes target_tokens, {', '.join(INPUTS[loss])}; {field} has {sorted(given)} "
            "beside target_tokens",
            field=f"{field}.loss_inputs",
            loss=loss.value,
        )


def _check_finite(datum: Datum, field: str, loss: Loss) -> None:
    # A position without an advantage does not count, and often carries the logprob of nothing.
    counts = datum.inputs["advantages"] != 0 if "advantages" in datum.inputs else np.True_
    for name, array in datum.inputs.items():
        ignored = name == "logprobs" and loss is not Loss.DRO
        bad = np.flatnonzero(~np.isfinite(array) & (counts if ignored else np.True_))
        if bad.size:
            raise errors.invalid_argument(
                "LOSS_INPUT_NOT_FINITE",
                f"{field}.{name}[{bad[0]}] is {array[bad[0]]}",
                field=f"{field}.loss_inputs[{name}]",
            )
