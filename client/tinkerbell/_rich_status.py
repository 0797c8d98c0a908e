"""Reads the google.rpc.Status that a service attaches to an error.

The messages are rebuilt here, field for field, in a descriptor pool of their own: the client then needs no
googleapis-common-protos, and does not clash with one that is installed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

TRAILER = "grpc-status-details-bin"
"""Key of the trailing metadata that carries the status."""

_DOMAIN = "tinkerbell"
_Field = descriptor_pb2.FieldDescriptorProto


def _build_messages() -> tuple[Any, Any, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="google/rpc/status_and_details.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"],
    )

    status = file.message_type.add(name="Status")
    status.field.add(name="code", number=1, type=_Field.TYPE_INT32, label=_Field.LABEL_OPTIONAL)
    status.field.add(name="message", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    status.field.add(
        name="details",
        number=3,
        type=_Field.TYPE_MESSAGE,
        type_name=".google.protobuf.Any",
        label=_Field.LABEL_REPEATED,
    )

    info = file.message_type.add(name="ErrorInfo")
    info.field.add(name="reason", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    info.field.add(name="domain", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    info.field.add(
        name="metadata",
        number=3,
        type=_Field.TYPE_MESSAGE,
        type_name=".google.rpc.ErrorInfo.MetadataEntry",
        label=_Field.LABEL_REPEATED,
    )

    retry = file.message_type.add(name="RetryInfo")
    retry.field.add(
        name="retry_delay",
        number=1,
        type=_Field.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=_Field.LABEL_OPTIONAL,
    )

    pool.Add(file)
    return (
        message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.Status")),
        message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.ErrorInfo")),
        message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.RetryInfo")),
    )


_Status, _ErrorInfo, _RetryInfo = _build_messages()


@dataclasses.dataclass(frozen=True)
class Details:
    """What a status says beyond code and text; empty where it says nothing.

    reason, metadata: of Tinkerbell's ErrorInfo. retry_seconds: of a RetryInfo.
    """

    reason: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    retry_seconds: float | None = None


def details(serialized_status: bytes) -> Details:
    """What the status carries. DecodeError when the bytes are not a google.rpc.Status."""
    found = Details()
    for detail in _Status.FromString(serialized_status).details:
        if detail.type_url.endswith("/google.rpc.ErrorInfo"):
            info = _ErrorInfo.FromString(detail.value)
            if info.domain == _DOMAIN:
                found = dataclasses.replace(found, reason=info.reason, metadata=dict(info.metadata))
        elif detail.type_url.endswith("/google.rpc.RetryInfo"):
            delay = _RetryInfo.FromString(detail.value).retry_delay
            found = dataclasses.replace(found, retry_seconds=delay.seconds + delay.nanos * 1e-9)
    return found
