"""Adapters in transit."""

import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tinkerbell import payload
from tinkerbell.v1 import common_pb2

SHAPES = [("x.lora_A.weight", (2, 3)), ("x.lora_B.weight", (5, 2))]


def manifest_of(content: bytes) -> common_pb2.AdapterManifest:
    lora = common_pb2.LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"])
    manifest = payload.build_manifest(lora, SHAPES, common_pb2.DATA_TYPE_FLOAT32, "base")
    manifest.digest = payload.digest(manifest, content)
    return manifest


CONTENT = np.arange(16, dtype=np.float32).tobytes()


def test_digest_is_what_the_proto_file_says() -> None:
    header = (
        "tinkerbell.v1.adapter\n"
        f"base 2 {struct.pack('>d', 4.0).hex()} lora\n"
        "x.lora_A.weight float32 2,3\n"
        "x.lora_B.weight float32 5,2\n"
        "\n"
    )
    assert manifest_of(CONTENT).digest == blake3(header.encode() + blake3(CONTENT).digest()).hexdigest()


def test_header_of_an_adapter_with_patterns_is_this_very_text() -> None:
    manifest = manifest_of(CONTENT)
    manifest.lora.use_rslora = True
    manifest.lora.rank_pattern.update({"model.layers.10.q_proj": 3, "model.layers.2.q_proj": 1})
    manifest.lora.alpha_pattern.update({"b": 0.1, "a": 2.0})
    assert payload.digest_header(manifest).decode() == (
        "tinkerbell.v1.adapter\n"
        "base 2 4010000000000000 rslora\n"
        "rank model.layers.10.q_proj 3\n"
        "rank model.layers.2.q_proj 1\n"
        "alpha a 4000000000000000\n"
        "alpha b 3fb999999999999a\n"
        "x.lora_A.weight float32 2,3\n"
        "x.lora_B.weight float32 5,2\n"
        "\n"
    )
    assert payload.digest(manifest, CONTENT) == "ce45fa1b2d93a5be6ce1b1765fea6eea0c79cd19a8648bb11becdaefc8e71979"


@pytest.mark.parametrize("change", ["rank", "alpha", "scaling", "rank_pattern", "alpha_pattern", "name", "base"])
def test_digest_covers_more_than_the_bytes(change: str) -> None:
    manifest = manifest_of(CONTENT)
    before = manifest.digest
    if change == "rank":
        manifest.lora.rank = 3
    elif change == "alpha":
        manifest.lora.alpha = 5.0
    elif change == "scaling":
        manifest.lora.use_rslora = True
    elif change == "rank_pattern":
        manifest.lora.rank_pattern["x"] = 2
    elif change == "alpha_pattern":
        manifest.lora.alpha_pattern["x"] = 4.0
    elif change == "name":
        manifest.tensors[0].name = "y"
    else:
        manifest.base_model_fingerprint = "other"
    assert payload.digest(manifest, CONTENT) != before


def test_chunks_of_a_long_payload_arrive_whole() -> None:
    content = np.random.default_rng(0).bytes(3 * payload.CHUNK_BYTES + 12)
    manifest = common_pb2.AdapterManifest(size_bytes=len(content))
    manifest.digest = payload.digest(manifest, content)
    buffer = bytearray(len(content))
    receiver = payload.Receiver(manifest, buffer)
    chunks = list(payload.chunks(content))
    assert [len(chunk.data) for chunk in chunks] == [payload.CHUNK_BYTES] * 3 + [12]
    for chunk in chunks:
        receiver.add(chunk)
    receiver.finish()
    assert buffer == content


@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found_by_the_digest(position: int, change: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[position] ^= change
    receiver = payload.Receiver(manifest_of(CONTENT), bytearray(len(CONTENT)))
    for chunk in payload.chunks(bytes(damaged)):
        receiver.add(chunk)
    with pytest.raises(payload.PayloadError, match="digest"):
        receiver.finish()


def test_an_incomplete_payload_is_refused() -> None:
    receiver = payload.Receiver(manifest_of(CONTENT), bytearray(len(CONTENT)))
    with pytest.raises(payload.PayloadError, match="0 of 64 bytes"):
        receiver.finish()


def test_layout_with_a_gap_or_a_repeated_name_is_refused() -> None:
    manifest = manifest_of(CONTENT)
    payload.check_layout(manifest)
    manifest.tensors[1].offset += 4
    with pytest.raises(payload.PayloadError, match=r"x\.lora_B"):
        payload.check_layout(manifest)
    manifest = manifest_of(CONTENT)
    manifest.tensors[1].name = manifest.tensors[0].name
    with pytest.raises(payload.PayloadError, match="twice"):
        payload.check_layout(manifest)
