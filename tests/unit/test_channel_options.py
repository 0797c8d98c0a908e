"""gRPC ignores an option whose name it does not know, so a misspelt keepalive cuts idle clients off minutes later."""

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from service_common import rpc
from tinkerbell import _connection, local

OPTIONS = [*rpc._SERVER_OPTIONS, *_connection._CHANNEL_OPTIONS, *local._CHANNEL_OPTIONS]


@pytest.fixture(scope="module")
def grpc_core() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", sorted({name for name, _ in OPTIONS} - {"grpc.so_reuseport"}))
def test_grpc_knows_every_option_we_set(grpc_core: bytes, name: str) -> None:
    assert name.encode() + b"\0" in grpc_core  # all of a name: each begins with "grpc."


def test_a_misspelt_option_would_be_noticed(grpc_core: bytes) -> None:
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms" not in grpc_core


def test_servers_allow_the_pings_that_clients_send() -> None:
    server, client = dict(rpc._SERVER_OPTIONS), dict(_connection._CHANNEL_OPTIONS)
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    assert server["grpc.keepalive_permit_without_calls"] == client["grpc.keepalive_permit_without_calls"] == 1
