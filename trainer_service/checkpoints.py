"""Checkpoints of adapters on disk: whole or absent, and readable by PEFT as they are.

ROOT/ADAPTER/NAME/ holds
  adapter_config.json, adapter_model.safetensors   as PEFT writes them
  optimizer.safetensors                            AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME of each tensor
  replies.json                                     the kept answers of the idempotency table
  manifest.json                                    everything else, the digests of these files, and its own

This module knows whole tensors only, so a checkpoint does not depend on the number of ranks that made it.
"""

import base64
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from google.protobuf import json_format

from service_common import errors, lora
from service_common.errors import ServiceError
from tinkerbell import peft_folder
from tinkerbell.lora import LoraConfig
from tinkerbell.v1 import common_pb2
from trainer_service.idempotency import Reply

_FORMAT = 1
_OPTIMIZER = "optimizer.safetensors"
_REPLIES = "replies.json"
_MANIFEST = "manifest.json"
_REMOVED = ".removed"  # in an adapter's folder: when it was removed, in seconds since 1970
_PUBLISHED = ".published"  # likewise: the last version that was sent to samplers
_SCALARS = ("base_model_name", "base_model_fingerprint", "seed", "step", "seq_id", "last_adam", "published_version")


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All that an adapter is. Tensors are float32 under their PEFT names, A [rank, in] and B [out, rank]."""

    adapter_id: str
    config: common_pb2.LoraConfig  # every field set
    base_model_name: str
    base_model_fingerprint: str
    seed: int
    step: int
    seq_id: int  # the last operation, by number
    last_adam: dict[str, float] | None  # None before the first step
    published_version: int
    replies: Sequence[Reply]  # oldest first
    weights: dict[str, np.ndarray]
    exp_avg: dict[str, np.ndarray]
    exp_avg_sq: dict[str, np.ndarray]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's description; the Checkpoint message of trainer.proto."""

    checkpoint_id: str  # ADAPTER/NAME
    adapter_id: str
    lora: common_pb2.LoraConfig
    step: int
    seq_id: int
    created_at: float  # seconds since 1970
    expires_at: float  # likewise; 0 for never
    size_bytes: int
    path: Path
    base_model_fingerprint: str

    def expired(self, now: float) -> bool:
        """Whether its time has passed; `now` in seconds since 1970."""
        return 0 < self.expires_at <= now


class CheckpointStore:
    """The checkpoints in one folder, for one process. Its methods may run on several threads at once.

    `now` is in seconds since 1970 and means the present when it is absent. A checkpoint whose time has passed exists
    for no method but `expire`, which removes its files, and `delete`.
    """

    def __init__(self, root: Path):
        """Makes the folder if it is not there. UNAVAILABLE when it cannot."""
        self.root = root.resolve()
        with self._storage_errors():
            self.root.mkdir(parents=True, exist_ok=True)

    def save(
        self, state: AdapterState, name: str, ttl_seconds: float = 0.0, now: float | None = None
    ) -> CheckpointInfo:
        """Writes a checkpoint, which is on the disk when this returns; `ttl_seconds` 0 keeps it for ever.

        INVALID_ARGUMENT on a bad name, ALREADY_EXISTS on one that is taken, RESOURCE_EXHAUSTED when the disk is full.
        A save that fails leaves nothing.
        """
        now = time.time() if now is None else now
        checkpoint_id = f"{state.adapter_id}/{name}"
        folder = self._folder(checkpoint_id)
        if not (math.isfinite(ttl_seconds) and ttl_seconds >= 0):
            raise errors.invalid_argument(
                "TTL_OUT_OF_RANGE",
                f"ttl_seconds {ttl_seconds} is not finite and at least 0; 0 keeps the checkpoint for ever",
                field="ttl_seconds",
                ttl_seconds=ttl_seconds,
            )
        with self._storage_errors():
            if folder.exists():
                if not self._expired(checkpoint_id, now):
                    raise _exists(checkpoint_id)
                self._discard(folder)
            temporary = _temporary(folder)
            try:
                temporary.mkdir(parents=True)
                _write_all(temporary, state, now, now + ttl_seconds if ttl_seconds else 0.0)
                _sync(self.root)
                os.rename(temporary, folder)
            except BaseException as cause:
                shutil.rmtree(temporary, ignore_errors=True)
                if isinstance(cause, OSError) and cause.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    raise _exists(checkpoint_id) from cause  # saved meanwhile
                raise
            try:
                _sync(folder.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._discard(folder)
                raise
            return self._info(checkpoint_id, self._manifest(checkpoint_id))

    def load(self, checkpoint_id: str, now: float | None = None) -> AdapterState:
        """Reads a checkpoint and proves that its bytes are those that were written.

        The tensors' order is not kept. NOT_FOUND when there is no such checkpoint, DATA_LOSS, naming the file, when it
        is damaged.
        """
        folder = self._folder(checkpoint_id)
        with self._storage_errors():
            if not folder.exists():
                raise self._not_found(checkpoint_id)
            manifest = self._manifest(checkpoint_id)
            if self._info(checkpoint_id, manifest).expired(time.time() if now is None else now):
                raise self._not_found(checkpoint_id)
            for name, written in manifest["files"].items():
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                        raise _damaged(checkpoint_id, name, "it does not have the digest that it was written with")
            moments = safetensors.numpy.load_file(folder / _OPTIMIZER)
            return AdapterState(
                adapter_id=folder.parent.name,
                config=json_format.ParseDict(manifest["lora"], common_pb2.LoraConfig()),
                replies=[
                    Reply(**entry | {"content": base64.b64decode(entry["content"])})
                    for entry in json.loads((folder / _REPLIES).read_bytes())
                ],
                weights=safetensors.numpy.load_file(folder / peft_folder.WEIGHTS),
                exp_avg=_without_prefix(moments, "exp_avg."),
                exp_avg_sq=_without_prefix(moments, "exp_avg_sq."),
                **manifest["state"],
            )

    def list(self, adapter_id: str = "", now: float | None = None) -> Sequence[CheckpointInfo]:
        """Whole checkpoints, oldest first: of one adapter, or of all. Reads no tensors."""
        now = time.time() if now is None else now
        return [info for info in self._infos(adapter_id) if not info.expired(now)]

    def latest(self, adapter_id: str, now: float | None = None) -> CheckpointInfo | None:
        """The adapter's youngest checkpoint, None when it has none."""
        found = self.list(adapter_id, now)
        return found[-1] if found else None

    def delete(self, checkpoint_id: str) -> None:
        """Removes a checkpoint, a damaged one too. NOT_FOUND when there is none of this name."""
        folder = self._folder(checkpoint_id)
        with self._storage_errors():
            try:
                self._discard(folder)
            except FileNotFoundError:
                raise self._not_found(checkpoint_id) from None

    def expire(self, now: float) -> Sequence[str]:
        """Removes the checkpoints whose time has passed; their ids."""
        ids = [info.checkpoint_id for info in self._infos() if info.expired(now)]
        with self._storage_errors():
            for checkpoint_id in ids:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    self._discard(self._folder(checkpoint_id))
        return ids

    def mark_removed(self, adapter_id: str, now: float | None = None) -> None:
        """Notes that the adapter was removed: its checkpoints stay, but `restorable` leaves it out."""
        folder = self.root / adapter_id
        with self._storage_errors(), contextlib.suppress(FileNotFoundError):  # it has no checkpoints
            temporary = _temporary(folder / "removed")
            _write(temporary, repr(time.time() if now is None else now).encode())
            os.rename(temporary, folder / _REMOVED)
            _sync(folder)

    def mark_published(self, adapter_id: str, version: int) -> None:
        """Notes that the adapter's versions up to this one are used, whatever becomes of this process."""
        folder = self.root / adapter_id
        with self._storage_errors():
            folder.mkdir(exist_ok=True)
            temporary = _temporary(folder / "published")
            _write(temporary, str(version).encode())
            os.rename(temporary, folder / _PUBLISHED)
            _sync(folder)

    def published(self, adapter_id: str) -> int:
        """The last version that was noted; 0 when none was."""
        with self._storage_errors():
            try:
                return int((self.root / adapter_id / _PUBLISHED).read_text())
            except FileNotFoundError:
                return 0

    def restorable(self) -> Mapping[str, Sequence[CheckpointInfo]]:
        """By adapter, its checkpoints from after it was last removed, oldest first; in the order of their first."""
        found: dict[str, list[CheckpointInfo]] = {}
        for info in self.list():
            marker = self.root / info.adapter_id / _REMOVED
            with self._storage_errors():
                removed_at = float(marker.read_text()) if marker.exists() else 0.0
            if info.created_at > removed_at:
                found.setdefault(info.adapter_id, []).append(info)
        return found

    def clear_leftovers(self) -> None:
        """Removes what a killed process left half done. For the start, while nothing else writes to the folder."""
        with self._storage_errors():
            for temporary in self.root.glob("*/.*.tmp-*"):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
            for adapter in self.root.iterdir():
                with contextlib.suppress(OSError):  # not empty
                    adapter.rmdir()

    def _folder(self, checkpoint_id: str) -> Path:
        """Where a checkpoint belongs. INVALID_ARGUMENT unless the id is two plain names: none leads elsewhere."""
        adapter_id, _, name = checkpoint_id.partition("/")
        lora.check_adapter_id(adapter_id)
        try:
            lora.check_adapter_id(name)
        except ServiceError:
            raise errors.invalid_argument(
                "CHECKPOINT_ID_INVALID",
                f"checkpoint {checkpoint_id!r} must be ADAPTER/NAME, NAME being 1 to 64 of [A-Za-z0-9._-], starting "
                "with a letter or digit",
                checkpoint_id=checkpoint_id,
            ) from None
        return self.root / adapter_id / name

    def _infos(self, adapter_id: str = "") -> Sequence[CheckpointInfo]:
        """As `list`, with those whose time has passed."""
        if adapter_id:
            lora.check_adapter_id(adapter_id)
        infos = []
        with self._storage_errors():
            for folder in self.root.glob(f"{adapter_id or '*'}/*/"):
                checkpoint_id = f"{folder.parent.name}/{folder.name}"
                with contextlib.suppress(ServiceError):  # being written, or damaged, and then `load` says where
                    infos.append(self._info(checkpoint_id, self._manifest(checkpoint_id)))
        return sorted(infos, key=lambda info: (info.created_at, info.seq_id, info.checkpoint_id))

    def _info(self, checkpoint_id: str, manifest: dict[str, Any]) -> CheckpointInfo:
        folder = self._folder(checkpoint_id)
        state = manifest["state"]
        size = sum(file["size_bytes"] for file in manifest["files"].values())
        return CheckpointInfo(
            checkpoint_id=checkpoint_id,
            adapter_id=folder.parent.name,
            lora=json_format.ParseDict(manifest["lora"], common_pb2.LoraConfig()),
            step=state["step"],
            seq_id=state["seq_id"],
            created_at=manifest["created_at"],
            expires_at=manifest["expires_at"],
            size_bytes=size + len(_sealed(manifest)),
            path=folder,
            base_model_fingerprint=state["base_model_fingerprint"],
        )

    def _manifest(self, checkpoint_id: str) -> dict[str, Any]:
        """A manifest that is whole, of files that have the sizes it says; else DATA_LOSS."""
        folder = self._folder(checkpoint_id)
        try:
            content = (folder / _MANIFEST).read_bytes()
        except FileNotFoundError:
            raise _damaged(checkpoint_id, _MANIFEST, "it is missing") from None
        manifest = _unsealed(content)
        if manifest is None:
            raise _damaged(checkpoint_id, _MANIFEST, "it does not have its own digest")
        if manifest["format"] != _FORMAT:
            raise errors.failed_precondition(
                "CHECKPOINT_FORMAT_UNKNOWN",
                f"checkpoint {checkpoint_id!r} has format {manifest['format']}, and this trainer reads {_FORMAT}; load "
                "it with the release that wrote it",
                checkpoint_id=checkpoint_id,
                format=manifest["format"],
            )
        for name, written in manifest["files"].items():
            try:
                size = (folder / name).stat().st_size
            except FileNotFoundError:
                raise _damaged(checkpoint_id, name, "it is missing") from None
            if size != written["size_bytes"]:
                raise _damaged(checkpoint_id, name, f"it has {size} bytes and had {written['size_bytes']}")
        return manifest

    def _expired(self, checkpoint_id: str, now: float) -> bool:
        """False for a damaged checkpoint, which stays until somebody deletes it."""
        try:
            return self._info(checkpoint_id, self._manifest(checkpoint_id)).expired(now)
        except ServiceError:
            return False

    def _discard(self, folder: Path) -> None:
        """Removes a checkpoint's folder in one step; FileNotFoundError when it is gone."""
        temporary = _temporary(folder)
        os.rename(folder, temporary)
        try:
            _sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # what is left is cleared at the next start

    def _not_found(self, checkpoint_id: str) -> ServiceError:
        adapter_id = checkpoint_id.partition("/")[0]
        existing = errors.listed(info.checkpoint_id for info in self.list(adapter_id))
        return errors.not_found(
            "CHECKPOINT_NOT_FOUND",
            f"there is no checkpoint {checkpoint_id!r}; adapter {adapter_id!r} has: {existing}",
            checkpoint_id=checkpoint_id,
        )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turns OSError into RESOURCE_EXHAUSTED where space is short and into UNAVAILABLE elsewhere."""
        try:
            yield
        except OSError as cause:
            if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise errors.resource_exhausted(
                    "CHECKPOINT_DISK_FULL",
                    f"no space is left in the checkpoint folder {self.root}; delete checkpoints or enlarge it",
                    folder=self.root,
                ) from cause
            raise errors.unavailable(
                "CHECKPOINT_FOLDER_UNUSABLE",
                f"the checkpoint folder {self.root} cannot be used: {cause}; the trainer must be able to read and "
                "write it",
                folder=self.root,
            ) from cause


def _temporary(folder: Path) -> Path:
    """A sibling whose leading dot no name can have."""
    return folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex}")


def _write_all(folder: Path, state: AdapterState, created_at: float, expires_at: float) -> None:
    """Fills an empty folder, the manifest last."""
    files = {name: _write(folder / name, content) for name, content in _contents(state)}
    manifest = {
        "format": _FORMAT,
        "created_at": created_at,
        "expires_at": expires_at,
        "lora": json_format.MessageToDict(state.config, preserving_proto_field_name=True),
        "state": {name: getattr(state, name) for name in _SCALARS},
        "files": files,
    }
    _write(folder / _MANIFEST, _sealed(manifest))
    _sync(folder)


def _contents(state: AdapterState) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of all but the manifest."""
    config = peft_folder.adapter_config(LoraConfig.from_proto(state.config), state.base_model_name)
    yield peft_folder.CONFIG, json.dumps(config, indent=2).encode()
    yield peft_folder.WEIGHTS, _serialized(state.weights)
    moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    yield (
        _OPTIMIZER,
        _serialized({f"{kind}.{name}": tensors[name] for kind, tensors in moments.items() for name in tensors}),
    )
    # Kept answers hold logprobs and grow to megabytes, which a listing should not have to read.
    replies = [asdict(reply) | {"content": base64.b64encode(reply.content).decode()} for reply in state.replies]
    yield _REPLIES, json.dumps(replies).encode()


def _serialized(tensors: dict[str, np.ndarray]) -> bytes:
    # safetensors reads an array's memory from its start on, whatever the strides (0.8.0).
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(contiguous, metadata={"format": "pt"})


def _without_prefix(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync(folder: Path) -> None:
    """Puts a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """As JSON that ends with the sha256 of the JSON without it."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=2).encode()


def _unsealed(content: bytes) -> dict[str, Any] | None:
    """What `_sealed` was given; None unless these are exactly the bytes it returned."""
    try:
        manifest = json.loads(content)
        del manifest["sha256"]
    except (ValueError, TypeError, KeyError):
        return None
    return manifest if _sealed(manifest) == content else None


def _exists(checkpoint_id: str) -> ServiceError:
    return errors.already_exists(
        "CHECKPOINT_EXISTS",
        f"there is a checkpoint {checkpoint_id!r}; choose another name or delete it first",
        checkpoint_id=checkpoint_id,
    )


def _damaged(checkpoint_id: str, file: str, how: str) -> ServiceError:
    return errors.data_loss(
        "CHECKPOINT_DAMAGED",
        f"{file} of checkpoint {checkpoint_id!r} is damaged: {how}; load another checkpoint and delete this one",
        checkpoint_id=checkpoint_id,
        file=file,
    )
