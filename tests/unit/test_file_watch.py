"""The demo's count of adapter files can count."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.file_watch import AdapterFileWatch


def counted(watch: AdapterFileWatch, name: str) -> bool:
    """Whether such a file is counted within two seconds."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if any(Path(file).name == name for file in watch.adapter_files):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("name", "size"), [("adapter_model.safetensors", 10), ("adapter_config.json", 10), ("x.pt", 10), ("x", 1 << 20)]
)
def test_a_file_written_by_another_process_is_counted(tmp_path: Path, name: str, size: int) -> None:
    (tmp_path / "folder").mkdir()
    with AdapterFileWatch(tmp_path) as watch:
        target = tmp_path / "folder" / name
        script = f"open({str(target)!r}, 'wb').write(b'x' * {size})"
        subprocess.run([sys.executable, "-c", script], check=True)
        assert counted(watch, name)


def test_a_file_renamed_into_place_is_counted_and_logs_are_not(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with AdapterFileWatch(tmp_path) as watch:
        (tmp_path / "folder" / "trainer.log").write_text("short")
        (tmp_path / "folder" / "part").write_text("short")
        os.rename(tmp_path / "folder" / "part", tmp_path / "folder" / "adapter_model.bin")
        assert counted(watch, "adapter_model.bin")
        assert not any("trainer.log" in file for file in watch.adapter_files)
