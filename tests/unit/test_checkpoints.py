"""Checkpoints: whole or absent, exact, and PEFT's."""

import dataclasses
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from checkpoint_states import state_of, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st

from service_common.errors import Code, ServiceError
from tinkerbell.v1 import common_pb2
from trainer_service import checkpoints
from trainer_service.checkpoints import AdapterState, CheckpointInfo, CheckpointStore, Reply


def assert_same(got: AdapterState, expected: AdapterState) -> None:
    for field in dataclasses.fields(AdapterState):
        one, other = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ("weights", "exp_avg", "exp_avg_sq"):
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == np.float32
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        else:
            assert one == other, field.name


def files_under(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_what_was_saved_is_loaded_by_another_process(store):
    state = state_of()
    saved = store.save(state, "step-7", now=100.0)
    again = CheckpointStore(store.root)
    assert_same(again.load("alice/step-7"), state)
    assert again.list() == [saved] == [again.latest("alice")]
    folder = store.root / "alice" / "step-7"
    assert saved == CheckpointInfo(
        checkpoint_id="alice/step-7",
        adapter_id="alice",
        lora=state.config,
        step=7,
        seq_id=19,
        created_at=100.0,
        expires_at=0.0,
        size_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        path=folder,
        base_model_fingerprint="f" * 64,
    )


def test_tensors_need_not_lie_in_one_piece(store):
    state = state_of()
    strided = {name: np.asfortranarray(tensor) for name, tensor in state.weights.items()}
    assert not next(iter(strided.values())).flags.c_contiguous
    store.save(dataclasses.replace(state, weights=strided), "one")
    assert_same(store.load("alice/one"), state)


json_floats = st.floats(allow_nan=False, allow_infinity=False)


@given(
    seed=st.integers(0, 2**64 - 1),
    base_model_name=st.text(),
    last_adam=st.none() | st.dictionaries(st.sampled_from(["learning_rate", "beta1", "eps"]), json_floats),
    replies=st.lists(st.builds(Reply, st.text(max_size=8), st.just("00"), st.just("a.B"), st.binary(max_size=64))),
    alpha=st.floats(1e-300, 1e300),
    use_rslora=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_every_scalar_and_kept_answer_comes_back_exactly(tmp_path_factory, alpha, use_rslora, **changes):
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    config = common_pb2.LoraConfig(rank=2, alpha=alpha, target_modules=["q_proj"], use_rslora=use_rslora)
    tensors = tensors_of(config, 0)
    state = state_of(**changes, config=config, weights=tensors, exp_avg=tensors, exp_avg_sq=tensors)
    with mock.patch.object(os, "fsync"):
        store.save(state, "n")
    assert_same(store.load("alice/n"), state)


def test_checkpoints_are_listed_oldest_first_and_by_adapter(store):
    store.save(state_of("bob", step=1), "z", now=1.0)
    store.save(state_of("alice", step=2), "y", now=2.0)
    store.save(state_of("bob", step=3), "a", now=3.0)
    assert [info.checkpoint_id for info in store.list()] == ["bob/z", "alice/y", "bob/a"]
    assert [info.checkpoint_id for info in store.list("bob")] == ["bob/z", "bob/a"]
    latest = store.latest("bob")
    assert latest is not None and latest.step == 3
    assert store.latest("carol") is None


def test_a_name_is_given_once(store):
    store.save(state_of(step=1), "one")
    with pytest.raises(ServiceError, match="alice/one") as caught:
        store.save(state_of(step=2), "one")
    assert (caught.value.code, caught.value.reason) == (Code.ALREADY_EXISTS, "CHECKPOINT_EXISTS")
    assert store.load("alice/one").step == 1


def test_of_two_writers_of_one_name_the_second_is_refused(store):
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        if not target.exists():
            shutil.copytree(source, target)
        rename(source, target)

    with mock.patch.object(os, "rename", overtaken), pytest.raises(ServiceError) as caught:
        store.save(state_of(), "one")
    assert caught.value.reason == "CHECKPOINT_EXISTS"
    assert_same(store.load("alice/one"), state_of())
    assert [path.name for path in (store.root / "alice").iterdir()] == ["one"]


def test_a_deleted_checkpoint_is_gone_and_its_name_is_free(store):
    store.save(state_of(step=1), "one")
    store.save(state_of(step=1), "two")
    store.delete("alice/one")
    assert [info.checkpoint_id for info in store.list()] == ["alice/two"]
    assert {Path(file).parts[1] for file in files_under(store.root)} == {"two"}
    for call in (store.delete, store.load):
        with pytest.raises(ServiceError, match="alice/two") as caught:  # the message lists what exists
            call("alice/one")
        assert (caught.value.code, caught.value.reason) == (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
    store.save(state_of(step=2), "one")
    assert store.load("alice/one").step == 2


def test_a_checkpoint_past_its_time_is_no_more(store):
    saved = store.save(state_of(step=1), "short", ttl_seconds=60, now=1000.0)
    store.save(state_of(), "long", now=1001.0)
    assert saved.expires_at == 1060.0
    assert [info.checkpoint_id for info in store.list(now=1059.9)] == ["alice/short", "alice/long"]
    assert [info.checkpoint_id for info in store.list(now=1060.0)] == ["alice/long"]
    assert store.load("alice/short", now=1059.9).step == 1
    with pytest.raises(ServiceError) as caught:
        store.load("alice/short", now=1060.0)
    assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
    assert store.expire(1059.9) == []
    assert store.expire(1060.0) == ["alice/short"]
    assert {Path(file).parts[1] for file in files_under(store.root)} == {"long"}


def test_a_name_whose_time_has_passed_can_be_given_again(store):
    store.save(state_of(step=1), "one", ttl_seconds=60, now=1000.0)
    with pytest.raises(ServiceError, match="delete it first"):
        store.save(state_of(step=2), "one", now=1059.0)
    store.save(state_of(step=2), "one", now=1061.0)
    assert store.load("alice/one").step == 2


@pytest.mark.parametrize("ttl_seconds", [-1.0, float("inf"), float("nan")])
def test_a_time_to_live_is_a_plain_number(store, ttl_seconds):
    with pytest.raises(ServiceError) as caught:
        store.save(state_of(), "one", ttl_seconds=ttl_seconds)
    assert (caught.value.reason, caught.value.field) == ("TTL_OUT_OF_RANGE", "ttl_seconds")
    assert files_under(store.root) == []


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b", "a\n", "ä", "x" * 65, "*", "..\\x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_folder(store, name):
    store.save(state_of(), "whole")
    before = files_under(store.root.parent)
    calls: list[Callable[[], object]] = [
        lambda: store.save(state_of(), name),
        lambda: store.save(state_of(adapter_id=name), "one"),
        lambda: store.load(f"alice/{name}"),
        lambda: store.delete(f"{name}/whole"),
        lambda: store.delete(f"alice/{name}"),
    ]
    for call in calls:
        with pytest.raises(ServiceError) as caught:
            call()
        assert caught.value.code is Code.INVALID_ARGUMENT
    assert files_under(store.root.parent) == before


@given(st.text(st.sampled_from("a./*\0~"), max_size=8))
@settings(deadline=None)
def test_an_id_is_two_names_or_refused(tmp_path_factory, checkpoint_id):
    with pytest.raises(ServiceError) as caught:
        CheckpointStore(tmp_path_factory.getbasetemp() / "ids").delete(checkpoint_id)
    parts = checkpoint_id.split("/")
    plain = len(parts) == 2 and all(part[:1] == "a" and set(part) <= {"a", "."} for part in parts)
    assert caught.value.code is (Code.NOT_FOUND if plain else Code.INVALID_ARGUMENT)


FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors", "replies.json"]


def assert_damaged(store: CheckpointStore, file: str) -> None:
    with pytest.raises(ServiceError) as caught:
        store.load("alice/one")
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "CHECKPOINT_DAMAGED")
    assert caught.value.metadata["file"] == file
    assert file in caught.value.message


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory) -> CheckpointStore:
    """With one checkpoint, alice/one, which tests leave as they found it."""
    store = CheckpointStore(tmp_path_factory.mktemp("shared"))
    store.save(state_of(), "one")
    return store


@pytest.mark.parametrize("file", FILES)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
@settings(max_examples=25, deadline=None)
def test_a_changed_byte_is_found_wherever_it_is(shared_store, file, place, change):
    path = shared_store.root / "alice" / "one" / file
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= change
    path.write_bytes(damaged)
    try:
        assert_damaged(shared_store, file)
    finally:
        path.write_bytes(content)


def test_every_byte_of_the_manifest_counts(shared_store):
    path = shared_store.root / "alice" / "one" / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        assert checkpoints._unsealed(bytes(damaged)) is None, position
    assert checkpoints._unsealed(content) is not None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_a_torn_checkpoint_is_not_listed_but_named_and_can_be_deleted(store, file, how):
    store.save(state_of(), "one")
    path = store.root / "alice" / "one" / file
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if how == "cut" else 0)
    assert store.list() == []
    assert store.latest("alice") is None
    assert_damaged(store, file)
    store.delete("alice/one")
    store.save(state_of(), "one")
    assert_same(store.load("alice/one"), state_of())


def test_a_later_format_is_not_guessed_at(store, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    store.save(state_of(), "one")
    monkeypatch.undo()
    with pytest.raises(ServiceError) as caught:
        store.load("alice/one")
    assert caught.value.reason == "CHECKPOINT_FORMAT_UNKNOWN"


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def failing(position: int, cause: BaseException, once: bool) -> Iterator[list[str]]:
    """Lets the call to the file system at `position` fail, and unless `once` all after it; yields the calls made.

    A failing write writes half.
    """
    calls: list[str] = []

    def fails(name: str) -> bool:
        calls.append(name)
        return len(calls) == position + 1 if once else len(calls) > position

    def wrapped(name: str) -> Callable:
        function = getattr(os, name)

        def call(*arguments, **keywords):
            if fails(name):
                raise cause
            return function(*arguments, **keywords)

        return call

    class Writer(io.BufferedWriter):
        def write(self, content) -> int:
            if fails("write"):
                super().write(content[: len(content) // 2])
                raise cause
            return super().write(content)

    def opened(path: Path, mode: str) -> Writer:
        if fails("open"):
            raise cause
        return Writer(io.FileIO(path, mode.removesuffix("b")))

    with ExitStack() as patches:
        for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
            patches.enter_context(mock.patch.object(os, name, wrapped(name)))
        patches.enter_context(mock.patch.object(checkpoints, "open", opened, create=True))
        yield calls


def calls_of_a_save(root: Path) -> int:
    """In a folder where the adapter has a checkpoint already."""
    store = CheckpointStore(root)
    store.save(state_of(), "before")
    with failing(1000, Killed(), once=True) as calls:
        store.save(state_of(), "one")
    assert calls.count("write") == len(FILES)
    assert calls.count("fsync") == len(FILES) + 3
    assert calls.count("rename") == 1
    return len(calls)


def test_a_writer_killed_anywhere_leaves_the_whole_or_nothing(tmp_path):
    whole = 0
    for position in range(calls_of_a_save(tmp_path / "clean")):
        root = tmp_path / str(position)
        store = CheckpointStore(root)
        store.save(state_of(step=1), "before", now=1.0)
        with failing(position, Killed(), once=False) as calls, pytest.raises(Killed):
            store.save(state_of(step=2), "one", now=2.0)
        store = CheckpointStore(root)
        names = [info.checkpoint_id for info in store.list()]
        if "rename" in calls[:position]:  # only the parent's fsync was left to do
            whole += 1
            assert names == ["alice/before", "alice/one"]
            assert_same(store.load("alice/one"), state_of(step=2))
            store.delete("alice/one")
        else:
            assert names == ["alice/before"]
        store.clear_leftovers()
        assert {path.name for path in (root / "alice").iterdir()} == {"before"}
        store.save(state_of(step=3), "one", now=3.0)
        assert_same(store.load("alice/one"), state_of(step=3))
        assert_same(store.load("alice/before"), state_of(step=1))
    assert whole == 1


def test_a_save_that_fails_anywhere_leaves_nothing_and_says_why(tmp_path):
    for position in range(calls_of_a_save(tmp_path / "clean")):
        store = CheckpointStore(tmp_path / str(position))
        store.save(state_of(step=1), "before")
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with failing(position, full, once=True), pytest.raises(ServiceError) as caught:
            store.save(state_of(), "one")
        assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "CHECKPOINT_DISK_FULL")
        assert str(store.root) in caught.value.message
        assert [path.name for path in store.root.glob("*/*")] == ["before"]
        store.save(state_of(), "one")
        assert_same(store.load("alice/one"), state_of())


def test_a_delete_killed_anywhere_leaves_the_whole_or_nothing(tmp_path):
    for position in range(8):
        store = CheckpointStore(tmp_path / str(position))
        store.save(state_of(), "one")
        with failing(position, Killed(), once=False) as calls, pytest.raises(Killed):
            store.delete("alice/one")
        if "rename" in calls[:position]:
            assert store.list() == []
        else:
            assert_same(store.load("alice/one"), state_of())
            store.delete("alice/one")
        store.clear_leftovers()
        assert list(store.root.iterdir()) == []
        store.save(state_of(), "one")


def test_everything_is_on_the_disk_before_the_name_appears(store):
    events = []
    rename = os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(target)
        rename(source, target)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "rename", recorded_rename):
        store.save(state_of(), "one")
    folder = store.root / "alice" / "one"
    temporary = events[0].parent
    assert temporary.parent == folder.parent and temporary != folder
    files, rest = events[: len(FILES)], events[len(FILES) :]
    assert sorted(path.name for path in files) == FILES and files[-1].name == "manifest.json"
    assert rest == [temporary, store.root, folder, folder.parent]


def test_a_deleted_name_is_off_the_disk_before_its_files_go(store):
    store.save(state_of(), "one")
    left: list[str] = []

    def fsync(descriptor: int) -> None:
        left.extend(path.name for path in (store.root / "alice").glob("*/*"))

    with mock.patch.object(os, "fsync", fsync):
        store.delete("alice/one")
    assert sorted(left) == FILES
    assert files_under(store.root) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match=str(tmp_path / "file")) as caught:
        CheckpointStore(tmp_path / "file")
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "CHECKPOINT_FOLDER_UNUSABLE")
    store = CheckpointStore(tmp_path / "store")
    denied = OSError(errno.EACCES, os.strerror(errno.EACCES))
    with failing(2, denied, once=True), pytest.raises(ServiceError, match="Permission denied") as caught:
        store.save(state_of(), "one")
    assert caught.value.code is Code.UNAVAILABLE
    assert files_under(tmp_path / "store") == []


def test_clearing_leftovers_leaves_what_is_whole(store):
    store.save(state_of(), "one")
    torn = store.root / "alice" / ".two.tmp-0"
    shutil.copytree(store.root / "alice" / "one", torn)
    (store.root / "bob").mkdir()
    assert [info.checkpoint_id for info in store.list()] == ["alice/one"]
    store.clear_leftovers()
    assert [path.name for path in store.root.iterdir()] == ["alice"]
    assert [path.name for path in (store.root / "alice").iterdir()] == ["one"]
    assert_same(store.load("alice/one"), state_of())
