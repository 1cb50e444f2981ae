"""Files that are there whole or not at all, and folders that one process works in."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to `path` by temporary file, fsync and rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(scratch, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not tell which file
    finally:
        scratch.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder: a second process that trains here is refused. The kernel frees it when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield
        return
    with open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(f.fileno()), os.stat(folder / ".lock")):
                raise BlockingIOError("moved away meanwhile")
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(
                f"{folder}: another process is training here; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{folder}: expected a folder that can be locked against a second training, found "
                f"{error.strerror or error}; give an --out on a local disk"
            ) from None
        yield
