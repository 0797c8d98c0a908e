"""What the trainer counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
_TENANTS = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The trainer's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pass_tenants = Histogram(
            "tinkerbell_trainer_pass_tenants",
            "Adapters in one pass through the model.",
            buckets=_TENANTS,
            registry=self.registry,
        )
        self.pass_tokens = Histogram(
            "tinkerbell_trainer_pass_tokens",
            "Tokens in one pass through the model.",
            buckets=_TOKENS,
            registry=self.registry,
        )
        self.pass_seconds = Histogram(
            "tinkerbell_trainer_pass_seconds",
            "Duration of one pass, backward included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "tinkerbell_trainer_queue_seconds",
            "From the arrival of a Forward or ForwardBackward, its turn come, to the start of its first pass.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("tinkerbell_trainer_tokens", "Tokens computed.", ["operation"], registry=self.registry)
        self.steps = Counter("tinkerbell_trainer_optim_steps", "Optimizer steps applied.", registry=self.registry)
        self.refusals = Counter(
            "tinkerbell_trainer_refusals", "Losses and gradients refused.", ["reason"], registry=self.registry
        )
        self.adapters = Gauge("tinkerbell_trainer_adapters", "Adapters that exist.", registry=self.registry)
        self.samplers = Gauge(
            "tinkerbell_trainer_samplers",
            "Samplers that are known, by whether they have every current version.",
            ["state"],
            registry=self.registry,
        )
        self.pushed_bytes = Counter(
            "tinkerbell_trainer_pushed_bytes",
            "Payload bytes that SyncAdapter has brought to samplers, by transport.",
            ["transport"],
            registry=self.registry,
        )
        self.drift = Gauge(
            "tinkerbell_trainer_sampler_drift",
            "Mean absolute difference between the log-probabilities of the trainer and of the sampler that is furthest "
            "from it, when they were last compared (SyncAdapter with verify, VerifyAdapter).",
            ["adapter_id"],
            registry=self.registry,
        )
