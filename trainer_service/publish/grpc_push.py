"""Pushes adapter versions to a sampler over a gRPC stream, from memory to memory."""

from dataclasses import dataclass

import grpc

from service_common import errors
from service_common.errors import Code, ServiceError
from service_common.rpc import MAX_MESSAGE_BYTES
from tinkerbell.errors import AlreadyExistsError, TinkerbellError, UnavailableError, from_rpc_error
from tinkerbell.push import push
from tinkerbell.v1 import common_pb2, sampler_pb2, sampler_pb2_grpc
from trainer_service.engine import Snapshot


@dataclass(frozen=True)
class Published:
    """What the sampler has live after a push."""

    version: int
    digest: str
    sent_bytes: int


class GrpcPublisher:
    """Publishes to one sampler."""

    def __init__(self, address: str):
        """`address`: HOST:PORT. Connects when first used and again whenever the sampler comes back."""
        self.address = address
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._channel = grpc.aio.insecure_channel(address, options)
        self._stub = sampler_pb2_grpc.SamplerServiceStub(self._channel)

    async def data_type(self) -> common_pb2.DataType:
        """The sampler's own element type; sending another one would only be rounded there. UNAVAILABLE."""
        try:
            info = await self._stub.GetBackendInfo(sampler_pb2.SamplerServiceGetBackendInfoRequest())
        except grpc.aio.AioRpcError as failure:
            raise self._service_error(from_rpc_error(failure)) from failure
        return info.base_model.dtype

    async def publish(self, adapter_id: str, snapshot: Snapshot, version: int) -> Published:
        """Makes the snapshot live as `version`, or as the next free number when the sampler has that one already, as
        after a restart of the trainer. The sampler's refusals come back with their own code and reason.
        """
        while True:
            begin = sampler_pb2.PushBegin(adapter_id=adapter_id, version=version, manifest=snapshot.manifest)
            try:
                committed = await push(self._stub, begin, snapshot.payload)
            except AlreadyExistsError as refusal:
                version = int(refusal.metadata["latest_version"]) + 1
                continue
            except TinkerbellError as failure:
                raise self._service_error(failure) from failure
            return Published(
                version=committed.version.version,
                digest=committed.version.digest,
                sent_bytes=0 if committed.already_live else len(snapshot.payload),
            )

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    def _service_error(self, failure: TinkerbellError) -> ServiceError:
        if isinstance(failure, UnavailableError) and not failure.reason:
            return errors.unavailable(
                "SAMPLER_UNREACHABLE",
                f"the sampler at {self.address} cannot be reached ({failure.message}); the version was not published, "
                "and the next SyncAdapter will try again",
                sampler=self.address,
            )
        if failure.reason:
            return ServiceError(Code[failure.code.name], failure.reason, failure.message, **failure.metadata)
        return errors.unavailable(
            "SAMPLER_FAILED",
            f"the sampler at {self.address} failed with {failure.code.name}: {failure.message}",
            sampler=self.address,
        )
