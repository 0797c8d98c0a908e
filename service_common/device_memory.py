"""GPU memory that processes of one host share, and host memory that a GPU copies from and to at full speed.

CUDA's own interprocess handles (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#interprocess-communication),
since PyTorch's need its pickles: 64 bytes name an allocation, which another process opens once and reads from then on.
"""

import ctypes
from typing import Any

import torch
from cuda.bindings import driver
from cuda.bindings import runtime as cudart

from service_common.cuda_ipc import HANDLE_BYTES


class DeviceMemoryError(Exception):
    """Why there is no such memory, or why it cannot be opened or pinned."""


class SharedMemory:
    """Memory on a GPU that other processes can open.

    handle: what they open it by, HANDLE_BYTES long. size_bytes: its size. tensor: uint8 [size_bytes], the memory.
    """

    def __init__(self, size_bytes: int, device: torch.device):
        """DeviceMemoryError when there is no memory. An allocation of its own: a handle names a whole one."""
        self.size_bytes = size_bytes
        with torch.cuda.device(device):
            self._address = int(_checked(cudart.cudaMalloc(size_bytes)))
            try:
                handle = _checked(cudart.cudaIpcGetMemHandle(self._address))
            except DeviceMemoryError:  # this platform does not have them
                self.free()
                raise
            self.handle = ctypes.string_at(handle.getPtr(), HANDLE_BYTES)
            self.tensor = torch.as_tensor(_Memory(self._address, size_bytes), device=device)

    def free(self) -> None:
        """Gives the memory back. CUDA does not promise anything to those who still have it open."""
        _checked(cudart.cudaFree(self._address))


class OpenedMemory:
    """Another process's SharedMemory."""

    def __init__(self, handle: bytes, size_bytes: int, device: torch.device):
        """For copies to `device`, which may be another GPU that reaches that one. Takes some 0.2 s.

        DeviceMemoryError when the handle is of another host, of memory that is gone or smaller than `size_bytes`, or of
        a GPU out of reach.
        """
        opened = cudart.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        with torch.cuda.device(device):
            self._address = int(_checked(cudart.cudaIpcOpenMemHandle(opened, cudart.cudaIpcMemLazyEnablePeerAccess)))
            _, _, size = driver.cuMemGetAddressRange(self._address)
        if size < size_bytes:  # whoever reads behind the end of it is killed
            self.close()
            raise DeviceMemoryError(f"the memory has {size} bytes, and is said to have {size_bytes}")

    def copy_to(self, target: torch.Tensor, offset: int) -> None:
        """Fills a contiguous tensor with the bytes from `offset` on, in the order of its device's current stream."""
        stream = torch.cuda.current_stream(target.device).cuda_stream
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        _checked(cudart.cudaMemcpyAsync(target.data_ptr(), self._address + offset, target.nbytes, kind, stream))

    def close(self) -> None:
        """No copy may be under way."""
        _checked(cudart.cudaIpcCloseMemHandle(self._address))


def copy_to_host(content: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event:
    """Begins to copy from a GPU to pinned memory, beside what else the GPU does; the event happens at the end.

    Nobody may write to `content` any more.
    """
    copying = torch.cuda.Stream()
    copying.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copying):
        host.copy_(content, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    content.record_stream(copying)
    return arrived


def pin(memory: torch.Tensor) -> None:
    """Locks a tensor of host memory in place. DeviceMemoryError when it cannot be."""
    _checked(cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, cudart.cudaHostRegisterDefault))


def unpin(address: int) -> None:
    """Ends that, by the tensor's address."""
    _checked(cudart.cudaHostUnregister(address))


class _Memory:
    """For PyTorch to make a tensor of."""

    def __init__(self, address: int, size_bytes: int):
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *results = answer
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        raise DeviceMemoryError(f"{status.name}: {text.decode()}")
    return results[0] if results else None
