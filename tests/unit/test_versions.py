import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampler_service.versions import Registry, Version
from service_common.errors import Code, ServiceError
from tinkerbell.v1 import common_pb2


def version(number: int, adapter_id: str = "a") -> Version:
    lora = common_pb2.LoraConfig(rank=8, alpha=16, target_modules=["q_proj"])
    manifest = common_pb2.AdapterManifest(lora=lora, digest=f"{number:064x}", size_bytes=4)
    return Version(adapter_id=adapter_id, version=number, manifest=manifest, payload=None, lora=lora, layout=b"")


@pytest.fixture
def dropped() -> list[int]:
    return []


@pytest.fixture
def registry(dropped) -> Registry:
    return Registry(keep_versions=2, drop=lambda gone: dropped.append(gone.version))


def live(registry: Registry) -> list[int]:
    return [entry.version.version for entry in registry.adapters().get("a", [])]


def test_a_request_without_a_version_gets_the_latest_at_admission_and_keeps_it(registry):
    registry.publish(version(1))
    with registry.use("a", 0) as leased:
        registry.publish(version(2))
        assert leased.version == 1
        with registry.use("a", 0) as later:
            assert later.version == 2


def test_the_last_versions_stay_and_older_ones_are_dropped(registry, dropped):
    for number in (1, 2, 5):
        registry.publish(version(number))
    assert live(registry) == [2, 5]
    assert dropped == [1]


def test_an_old_version_with_a_request_stays_until_the_request_has_ended(registry, dropped):
    registry.publish(version(1))
    with registry.use("a", 1):
        registry.publish(version(2))
        registry.publish(version(3))
        assert live(registry) == [1, 2, 3]
        assert dropped == []
        with registry.use("a", 1):  # it is live, so it can still be asked for
            pass
        assert dropped == []
    assert live(registry) == [2, 3]
    assert dropped == [1]


def test_a_leased_version_stays_without_requests_and_can_be_asked_for(registry, dropped):
    registry.publish(version(1))
    with registry.lease("a", 1):
        for number in (2, 3, 4):
            registry.publish(version(number))
        assert live(registry) == [1, 3, 4]
        with registry.use("a", 1) as used:
            assert used.version == 1
        assert live(registry) == [1, 3, 4]
        (entry, *_) = registry.adapters()["a"]
        assert (entry.active_requests, entry.leases) == (0, 1)
    assert live(registry) == [3, 4]
    assert dropped == [2, 1]


def test_unload_hides_at_once_and_drops_when_idle(registry, dropped):
    registry.publish(version(1))
    registry.publish(version(2))
    with registry.use("a", 2):
        assert registry.unload("a", 0) == [1, 2]
        assert dropped == [1]
        with pytest.raises(ServiceError) as refused, registry.use("a", 2):
            pass
        assert (refused.value.code, refused.value.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert dropped == [1, 2]


def test_unloading_the_latest_makes_the_one_before_it_the_latest(registry):
    registry.publish(version(1))
    registry.publish(version(2))
    assert registry.unload("a", 2) == [2]
    assert registry.latest("a").version == 1


def test_a_version_pushed_again_while_its_first_life_lingers_has_another_name_and_id(registry):
    first, second = version(1), version(1)
    registry.publish(first)
    with registry.use("a", 1):
        registry.unload("a", 1)
        registry.publish(second)
        assert registry.find("a", 1) is second
        assert first.lora_name != second.lora_name
        assert first.lora_id != second.lora_id
    assert registry.find("a", 1) is second


def test_what_is_missing_is_named_with_what_there_is(registry):
    registry.publish(version(1, "b"))
    registry.publish(version(3, "b"))
    with pytest.raises(ServiceError) as refused, registry.use("a", 0):
        pass
    assert refused.value.metadata == {"adapter_id": "a"}
    with pytest.raises(ServiceError) as refused, registry.use("b", 2):
        pass
    assert refused.value.reason == "VERSION_NOT_FOUND"
    assert refused.value.metadata["versions"] == "1,3"
    assert "1, 3" in refused.value.message


def test_versions_only_go_up(registry):
    registry.publish(version(2))
    with pytest.raises(ValueError, match="comes after"):
        registry.publish(version(2))


def test_names_keep_vllm_off_the_hub_and_its_prefix_caches_apart():
    one, two = version(1), version(2)
    assert one.uri.startswith("/")
    assert one.lora_name.startswith("a@1#0000000000000000")
    assert one.lora_name != two.lora_name
    assert 1 << 20 <= one.lora_id < two.lora_id < 1 << 31


@given(st.lists(st.sampled_from(["publish", "lease", "release", "unload"]), max_size=60), st.integers(1, 3))
def test_no_version_is_dropped_twice_or_while_it_is_leased(operations, keep):
    dropped = []
    leases = []

    def drop(gone):
        assert gone.lora_id not in dropped
        assert gone.lora_id not in [leased.lora_id for _, leased in leases]
        dropped.append(gone.lora_id)

    registry = Registry(keep, drop)
    published = []
    for operation in operations:
        latest = registry.latest("a")
        if operation == "publish":
            published.append(version(len(published) + 1))
            registry.publish(published[-1])
        elif operation == "lease" and latest:
            lease = registry.use("a", 0)
            leases.append((lease, lease.__enter__()))
        elif operation == "release" and leases:
            lease, _ = leases.pop(0)
            lease.__exit__(None, None, None)
        elif operation == "unload" and latest:
            registry.unload("a", latest.version)
    while leases:
        lease, _ = leases.pop()
        lease.__exit__(None, None, None)
    remaining = [entry.version.lora_id for entry in registry.adapters().get("a", [])]
    assert len(remaining) <= keep
    assert sorted(remaining + dropped) == [each.lora_id for each in published]
