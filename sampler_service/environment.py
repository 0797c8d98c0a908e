"""Environment variables that vLLM reads when it is imported and that its children inherit.

What the operator has set stays.
"""

import importlib.util
import os

# The process with which vLLM's are to end.
SAMPLER_PID = "TINKERBELL_SAMPLER_PID"


def prepare() -> None:
    """To be called before vLLM is imported."""
    os.environ[SAMPLER_PID] = str(os.getpid())
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        # Its own logging setup would print every line a second time, in another format.
        "VLLM_CONFIGURE_LOGGING": "0",
        # Binding threads to cores assumes that all cores of the host are ours.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Two logical CPUs are mostly one core; a thread on each is no faster, and much slower where CPUs are shared.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
    }
    if importlib.util.find_spec("flashinfer") is None:
        defaults["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
