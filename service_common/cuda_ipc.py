"""What two processes must agree on before one of them reads the other's GPU memory."""

from pathlib import Path

HANDLE_BYTES = 64  # of CUDA's handles for memory


def host_id() -> str:
    """The same for all processes that share a kernel, containers included, and drawn anew when it starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
