"""Where the samplers are."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

from service_common import errors

_DNS = "dns:"


class Discovery:
    """Addresses that were given, and those behind names: a headless Kubernetes service has one for every pod."""

    def __init__(self, targets: Sequence[str]):
        """`targets`: HOST:PORT for one sampler, dns:HOST:PORT for all that HOST stands for. INVALID_ARGUMENT else."""
        for target in targets:
            host, _, port = target.removeprefix(_DNS).rpartition(":")
            if not host or not port.isdecimal():
                raise errors.invalid_argument(
                    "SAMPLER_ADDRESS_INVALID",
                    f"sampler {target!r} must be HOST:PORT, or dns:HOST:PORT for all addresses of HOST",
                    sampler=target,
                )
        self._targets = tuple(targets)

    async def addresses(self) -> list[str]:
        """HOST:PORT of each sampler, in order. A name that cannot be looked up at the moment stands for none."""
        found: set[str] = set()
        for target in self._targets:
            if not target.startswith(_DNS):
                found.add(target)
                continue
            host, _, port = target.removeprefix(_DNS).rpartition(":")
            try:
                infos = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except socket.gaierror:
                continue
            found.update(_joined(str(info[4][0]), port) for info in infos)
        return sorted(found)


def _joined(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ipaddress.ip_address(host).version == 6 else f"{host}:{port}"
