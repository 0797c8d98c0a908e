"""A folder that is there whole or not at all."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill under a temporary name beside `path`, and renames it at the end.

    FileExistsError, before anything is written, when there is something at `path`. A failure leaves nothing.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; give the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
