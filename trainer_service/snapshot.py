"""An adapter's tensors at one moment, on their way out of the trainer."""

import torch

from tinkerbell import payload
from tinkerbell.v1 import common_pb2


class Snapshot:
    """A manifest, digest included, and the payload that it describes.

    step: optimizer steps that the adapter had had; None for one that a sampler gave back.
    """

    def __init__(
        self,
        manifest: common_pb2.AdapterManifest,
        content: memoryview,
        step: int | None = None,
        arrived: torch.cuda.Event | None = None,
    ):
        """`content`: the payload in host memory, once `arrived` has happened."""
        self.manifest = manifest
        self.step = step
        self._content = content
        self._arrived = arrived

    @property
    def payload(self) -> memoryview:
        """manifest.size_bytes of host memory; waits some milliseconds if they are still on their way from a GPU."""
        if self._arrived:
            self._arrived.synchronize()
        return self._content


def take(manifest: common_pb2.AdapterManifest, content: torch.Tensor, step: int) -> Snapshot:
    """Of a flat tensor that nobody changes any more, and whose manifest lacks nothing but the digest.

    When this returns all work is done that was queued before it.
    """
    if not content.is_cuda:
        host = memoryview(content.view(torch.uint8).numpy())
        manifest.digest = payload.digest(manifest, host)
        return Snapshot(manifest, host, step)
    from service_common.blake3_kernels import payload_hash  # noqa: PLC0415  (Triton)
    from service_common.device_memory import copy_to_host  # noqa: PLC0415  (CUDA's library)

    pinned = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)  # PyTorch keeps such memory for the next
    # First the hash: its 32 bytes would wait in one queue with the payload's, for ten times as long as hashing takes.
    manifest.digest = payload.digest_of(manifest, payload_hash(content))
    arrived = copy_to_host(content, pinned)
    return Snapshot(manifest, memoryview(pinned.view(torch.uint8).numpy()), step, arrived)
