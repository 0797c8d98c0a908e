"""Counts adapter files that anybody writes, by watching the file system."""

import tempfile
from pathlib import Path

from watchdog.events import FileClosedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

# An adapter in a file is at least one of these: named so, of such a format, or as large as one.
_NAMES = ("adapter_model", "adapter_config")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".distcp")
_LARGE_BYTES = 1 << 20


class AdapterFileWatch(FileSystemEventHandler):
    """Watches, as a context manager, every folder below `root` but its virtual environment, and where programs put
    what they do not keep in memory: the temporary folder, /dev/shm and ~/.cache.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.adapter_files: set[str] = set()
        self._observer = Observer()
        # Only these: with every event of reading, too, the kernel's queue would overflow and lose some.
        self._events: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent]
        self._observer.schedule(self, str(root), event_filter=self._events)
        folders = [entry for entry in root.iterdir() if entry.is_dir() and entry.name not in (".venv", ".git")]
        elsewhere = [Path(tempfile.gettempdir()), Path("/dev/shm"), Path.home() / ".cache"]
        for folder in {entry.resolve() for entry in (*folders, *elsewhere) if entry.is_dir()}:
            self._observer.schedule(self, str(folder), recursive=True, event_filter=self._events)

    def __enter__(self) -> "AdapterFileWatch":
        self._observer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._observer.stop()
        self._observer.join()

    def on_closed(self, event: FileSystemEvent) -> None:
        """A file that was open for writing was closed."""
        self._count(Path(str(event.src_path)))

    def on_moved(self, event: FileSystemEvent) -> None:
        """A file got its final name."""
        self._count(Path(str(event.dest_path)))

    def _count(self, path: Path) -> None:
        if path.name.startswith(_NAMES) or path.suffix in _SUFFIXES or _size(path) >= _LARGE_BYTES:
            self.adapter_files.add(str(path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone already
        return 0
