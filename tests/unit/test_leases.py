import asyncio

import pytest
from test_versions import live, version

from sampler_service.leases import Leases
from sampler_service.versions import Registry
from service_common.errors import Code, ServiceError


@pytest.fixture
def registry() -> Registry:
    registry = Registry(keep_versions=1, drop=lambda gone: None)
    registry.publish(version(1))
    return registry


async def test_a_lease_keeps_its_version_until_it_is_released(registry):
    leases = Leases(registry)
    lease_id, kept = leases.acquire("a", 0, 60.0)
    registry.publish(version(2))
    assert kept.version == 1
    assert live(registry) == [1, 2]
    leases.release(lease_id)
    assert live(registry) == [2]
    with pytest.raises(ServiceError) as refused:
        leases.release(lease_id)
    assert (refused.value.code, refused.value.reason) == (Code.NOT_FOUND, "LEASE_NOT_FOUND")


async def test_a_lease_ends_by_itself_and_can_be_prolonged_before(registry):
    leases = Leases(registry)
    lease_id, _ = leases.acquire("a", 1, 0.1)
    registry.publish(version(2))
    assert leases.acquire("a", 1, 0.3, lease_id)[0] == lease_id
    await asyncio.sleep(0.2)
    assert live(registry) == [1, 2]
    await asyncio.sleep(0.2)
    assert live(registry) == [2]
    with pytest.raises(ServiceError) as refused:
        leases.acquire("a", 1, 1.0, lease_id)
    assert refused.value.reason == "LEASE_NOT_FOUND"


async def test_what_cannot_be_leased_is_refused(registry):
    leases = Leases(registry)
    lease_id, _ = leases.acquire("a", 1, 60.0)
    registry.publish(version(2))
    for arguments, reason in (
        (("a", 3, 60.0), "VERSION_NOT_FOUND"),
        (("b", 0, 60.0), "ADAPTER_NOT_FOUND"),
        (("a", 1, 0.0), "TTL_OUT_OF_RANGE"),
        (("a", 1, float("nan")), "TTL_OUT_OF_RANGE"),
        (("a", 1, 1e6), "TTL_OUT_OF_RANGE"),
        (("a", 2, 60.0, lease_id), "LEASE_MISMATCH"),
    ):
        with pytest.raises(ServiceError) as refused:
            leases.acquire(*arguments)
        assert refused.value.reason == reason
    assert live(registry) == [1, 2]
