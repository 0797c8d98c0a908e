"""Versions that clients want to be kept, each for a while."""

import asyncio
import contextlib
import uuid
from dataclasses import dataclass

from sampler_service.versions import Registry, Version
from service_common import errors

MAX_TTL_SECONDS = 86400.0


@dataclass
class _Lease:
    version: Version
    hold: contextlib.ExitStack
    end: asyncio.TimerHandle


class Leases:
    """The leases by their ids. On one event loop, like the registry."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._leases: dict[str, _Lease] = {}

    def acquire(self, adapter_id: str, version: int, ttl_seconds: float, lease_id: str = "") -> tuple[str, Version]:
        """A new lease, or with `lease_id` a longer one, from now on. Its id and what it keeps.

        INVALID_ARGUMENT for a time that is out of range and for a lease of another version, NOT_FOUND when there is no
        such version or lease.
        """
        if not 0 < ttl_seconds <= MAX_TTL_SECONDS:
            raise errors.invalid_argument(
                "TTL_OUT_OF_RANGE",
                f"ttl_seconds is {ttl_seconds}, and must be above 0 and at most {MAX_TTL_SECONDS:g}",
                field="ttl_seconds",
                ttl_seconds=ttl_seconds,
            )
        end = asyncio.get_running_loop().call_later
        if lease_id:
            lease = self._lease(lease_id)
            kept = lease.version
            if (kept.adapter_id, kept.version) != (adapter_id, version or kept.version):
                raise errors.invalid_argument(
                    "LEASE_MISMATCH",
                    f"lease {lease_id!r} is on version {kept.version} of adapter {kept.adapter_id!r}, not on version "
                    f"{version} of {adapter_id!r}; leave lease_id empty for a new one",
                    field="lease_id",
                    lease_id=lease_id,
                )
            lease.end.cancel()
            lease.end = end(ttl_seconds, self.release, lease_id)
            return lease_id, kept
        hold = contextlib.ExitStack()
        kept = hold.enter_context(self._registry.lease(adapter_id, version))
        lease_id = uuid.uuid4().hex
        self._leases[lease_id] = _Lease(kept, hold, end(ttl_seconds, self.release, lease_id))
        return lease_id, kept

    def release(self, lease_id: str) -> None:
        """Ends a lease. NOT_FOUND when there is none of this id, or no longer."""
        lease = self._lease(lease_id)
        del self._leases[lease_id]
        lease.end.cancel()
        lease.hold.close()

    def _lease(self, lease_id: str) -> _Lease:
        try:
            return self._leases[lease_id]
        except KeyError:
            raise errors.not_found(
                "LEASE_NOT_FOUND",
                f"there is no lease {lease_id!r} on this sampler; its time may be over, take a new one",
                lease_id=lease_id,
            ) from None
