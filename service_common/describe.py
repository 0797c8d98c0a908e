"""Descriptions for GetBackendInfo."""

import importlib.metadata
from collections.abc import Sequence

from service_common.checkpoint import Checkpoint
from tinkerbell.v1 import common_pb2


def base_model_info(
    checkpoint: Checkpoint, dtype: common_pb2.DataType, max_sequence_length: int
) -> common_pb2.BaseModelInfo:
    """Describes the base model as this service holds it."""
    return common_pb2.BaseModelInfo(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        fingerprint=checkpoint.fingerprint,
        vocab_size=checkpoint.vocab_size,
        num_layers=checkpoint.config["num_hidden_layers"],
        hidden_size=checkpoint.config["hidden_size"],
        max_sequence_length=max_sequence_length,
        num_parameters=checkpoint.num_parameters,
        dtype=dtype,
    )


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
