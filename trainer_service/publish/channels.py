"""Connections to samplers."""

import grpc

from service_common.rpc import MAX_MESSAGE_BYTES

# A push that has not come to its end after this long has failed.
PUSH_SECONDS = 300.0

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def to_sampler(address: str) -> grpc.aio.Channel:
    """`address`: HOST:PORT. Connects when first used and again whenever the sampler comes back."""
    return grpc.aio.insecure_channel(address, _OPTIONS)
