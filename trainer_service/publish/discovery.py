"""Where the samplers are."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

import structlog

from service_common import errors

log = structlog.get_logger(__name__)

_DNS = "dns:"
_NO_SUCH_NAME = (socket.EAI_NONAME, socket.EAI_NODATA)


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
        self._found: dict[str, set[str]] = {}  # by target, when it was last looked up

    async def addresses(self) -> list[str]:
        """HOST:PORT of each sampler, in order.

        A name that there is not stands for none; one that cannot be looked up for the moment, for what it last did.
        """
        for target in self._targets:
            await self._look_up(target)
        return sorted(set().union(*self._found.values()))

    async def _look_up(self, target: str) -> None:
        if not target.startswith(_DNS):
            self._found[target] = {target}
            return
        host, _, port = target.removeprefix(_DNS).rpartition(":")
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as failure:  # UnicodeError: a part of the name is too long
            if isinstance(failure, socket.gaierror) and failure.errno in _NO_SUCH_NAME:
                self._found[target] = set()
            else:
                log.warning("lookup_failed", target=target, error=str(failure))
            return
        self._found[target] = {_joined(str(info[4][0]), port) for info in infos}


def _joined(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ipaddress.ip_address(host).version == 6 else f"{host}:{port}"
