"""Which versions of which adapters are live, and how many requests and leases are on each.

A version is immutable. It leaves when newer ones have replaced it, or when it is unloaded, but not before its last
request has ended: vLLM dies when an adapter that a request needs is gone. Newer ones do not replace a version that a
client has a lease on.

All of this happens on one event loop, so nothing here locks.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service_common import errors
from service_common.staging import StagingBuffer
from tinkerbell.v1 import common_pb2

URI_PREFIX = "/tinkerbell/"

# vLLM's own loaders count from 1, and its indices are int32.
_lora_ids = itertools.count(1 << 20)


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter, under the name and number by which vLLM knows it.

    adapter_id, version: as in AdapterVersion.
    manifest, payload: as they were pushed. The version owns the payload, which is freed with it.
    lora: rank, alpha and target modules, all of them set.
    layout: that of the manifest with this `lora`; see tinkerbell.payload.
    lora_id: never used twice in the life of this process.
    """

    adapter_id: str
    version: int
    manifest: common_pb2.AdapterManifest
    payload: StagingBuffer
    lora: common_pb2.LoraConfig
    layout: bytes
    lora_id: int = field(default_factory=lambda: next(_lora_ids))

    @property
    def digest(self) -> str:
        """As in AdapterManifest."""
        return self.manifest.digest

    @property
    def lora_name(self) -> str:
        """Unique per `lora_id`, which vLLM relies on, and per content, by which vLLM keys its prefix cache.

        The id is part of it because a version can be unloaded and pushed again while requests still run on it.
        """
        return f"{self.adapter_id}@{self.version}#{self.digest[:16]}.{self.lora_id}"

    @property
    def uri(self) -> str:
        """Key in the workers' stores. An absolute path, since vLLM would look for any other on the hub."""
        return URI_PREFIX + self.lora_name


@dataclass
class _Entry:
    version: Version
    requests: int = 0
    leases: int = 0
    live: bool = True

    @property
    def in_use(self) -> bool:
        return bool(self.requests or self.leases)


@dataclass(frozen=True)
class LiveVersion:
    """A version, the number of requests that run on it, and the number of leases on it."""

    version: Version
    active_requests: int
    leases: int


class Registry:
    """The live versions by adapter."""

    def __init__(self, keep_versions: int, drop: Callable[[Version], None]):
        """`drop` is called once per version, when it is neither live nor in use any more. It must not block."""
        self._keep_versions = keep_versions
        self._drop = drop
        self._adapters: dict[str, dict[int, _Entry]] = {}  # versions in ascending order, never empty

    def publish(self, version: Version) -> None:
        """Makes the version live, and the latest one, in one step. Its number must be above the latest one."""
        entries = self._adapters.setdefault(version.adapter_id, {})
        if entries and version.version <= max(entries):
            raise ValueError(f"{version.lora_name} comes after version {max(entries)}")
        entries[version.version] = _Entry(version)
        self._retire_old(version.adapter_id)

    def latest(self, adapter_id: str) -> Version | None:
        """The version that a request without a version gets, None if the adapter has none."""
        entries = self._adapters.get(adapter_id)
        return entries[max(entries)].version if entries else None

    def find(self, adapter_id: str, version: int) -> Version | None:
        """The version if it is live."""
        entry = self._adapters.get(adapter_id, {}).get(version)
        return entry.version if entry else None

    @contextlib.contextmanager
    def use(self, adapter_id: str, version: int) -> Iterator[Version]:
        """Keeps a version for one request; `version` 0 is the latest one at this moment. NOT_FOUND if there is none."""
        entry = self._entry(adapter_id, version)
        entry.requests += 1
        try:
            yield entry.version
        finally:
            entry.requests -= 1
            self._let_go(entry)

    @contextlib.contextmanager
    def lease(self, adapter_id: str, version: int) -> Iterator[Version]:
        """As `use`, for a client that means to send requests."""
        entry = self._entry(adapter_id, version)
        entry.leases += 1
        try:
            yield entry.version
        finally:
            entry.leases -= 1
            self._let_go(entry)

    def unload(self, adapter_id: str, version: int) -> list[int]:
        """Takes one version, or with 0 all of them, from new requests. Their numbers, ascending; or NOT_FOUND."""
        entries = self._entries(adapter_id)
        numbers = list(entries) if version == 0 else [self._entry(adapter_id, version).version.version]
        for number in numbers:
            self._remove(adapter_id, number)
        return numbers

    def adapters(self) -> dict[str, list[LiveVersion]]:
        """The live versions in ascending order, by adapter in order of name."""
        return {
            adapter_id: [LiveVersion(entry.version, entry.requests, entry.leases) for entry in entries.values()]
            for adapter_id, entries in sorted(self._adapters.items())
        }

    def _entries(self, adapter_id: str) -> dict[int, _Entry]:
        entries = self._adapters.get(adapter_id)
        if entries is None:
            raise errors.not_found(
                "ADAPTER_NOT_FOUND",
                f"adapter {adapter_id!r} is not on this sampler; it has: {errors.listed(self._adapters)}",
                adapter_id=adapter_id,
            )
        return entries

    def _entry(self, adapter_id: str, version: int) -> _Entry:
        entries = self._entries(adapter_id)
        entry = entries.get(version or max(entries))
        if entry is None:
            live = [str(number) for number in entries]
            raise errors.not_found(
                "VERSION_NOT_FOUND",
                f"version {version} of adapter {adapter_id!r} is not live; these are: {', '.join(live)}",
                adapter_id=adapter_id,
                version=version,
                versions=",".join(live),
            )
        return entry

    def _retire_old(self, adapter_id: str) -> None:
        entries = self._adapters[adapter_id]
        for number in list(entries)[: -self._keep_versions]:
            if not entries[number].in_use:
                self._remove(adapter_id, number)

    def _remove(self, adapter_id: str, number: int) -> None:
        entries = self._adapters[adapter_id]
        entry = entries.pop(number)
        if not entries:
            del self._adapters[adapter_id]
        entry.live = False
        if not entry.in_use:
            self._drop(entry.version)

    def _let_go(self, entry: _Entry) -> None:
        if entry.live:
            self._retire_old(entry.version.adapter_id)
        elif not entry.in_use:
            self._drop(entry.version)
