"""What the sampler tells Prometheus beside vLLM's own metrics, which have names that begin with vllm."""

import asyncio

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge

from sampler_service.engine import Engine
from sampler_service.sampler import Sampler

_COUNTING_SECONDS = 2.0


class Metrics:
    """The sampler's metrics."""

    def __init__(self, sampler: Sampler, engine: Engine, registry: CollectorRegistry = prometheus_client.REGISTRY):
        """`registry`: vLLM uses the default one."""
        self._engine = engine
        versions = Gauge("tinkerbell_sampler_versions", "Adapter versions that are live.", registry=registry)
        versions.set_function(lambda: sum(map(len, sampler.registry.adapters().values())))
        requests = Gauge("tinkerbell_sampler_requests", "Calls that run or wait in the engine.", registry=registry)
        requests.set_function(lambda: sampler.active_requests)
        self._reloads = Counter(
            "tinkerbell_sampler_adapter_reloads",
            "Versions that vLLM has evicted and loaded again, from memory.",
            registry=registry,
        )

    async def count(self) -> None:
        """Counts what happens in vLLM's workers, until it is cancelled."""
        counted = 0
        while True:
            reloads = await self._engine.reloads()
            self._reloads.inc(reloads - counted)
            counted = reloads
            await asyncio.sleep(_COUNTING_SECONDS)
