"""Files that are whole or absent: written beside their place and renamed at success."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.core.log import say
from mogul.core.units import show_bytes

_DISK_FULL = "No space left on device"
"""What writers in other languages say, whose errors have no number."""


def _cannot_write(path: Path, error: Exception) -> ArtifactError:
    free_bytes = _free_bytes(path)
    number = getattr(error, "errno", None)
    full = (errno.ENOSPC, errno.EDQUOT)
    if number in full or _DISK_FULL in str(error) or (number is None and free_bytes == 0):
        free = "" if free_bytes is None else f" ({show_bytes(free_bytes)} free)"
        return ArtifactError(
            f"no space left to write {path}{free}; nothing was kept",
            fix="free some space or choose another place",
        )
    told = getattr(error, "strerror", None) or str(error)  # numpy's errors have no number
    return ArtifactError(f"cannot write {path}: {told}", fix="choose another place")


def _existing_parent(path: Path) -> Path:
    for parent in (path, *path.absolute().parents):
        if parent.exists():
            return parent
    return Path("/")


def _free_bytes(path: Path) -> int | None:
    """What is free where `path` will be; None on file systems that do not count (of size 0)."""
    try:
        usage = shutil.disk_usage(_existing_parent(path))
    except OSError:
        return None
    return usage.free if usage.free or usage.total else None


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise ArtifactError where the disk that will hold `path` has fewer bytes free, as it says."""
    free_bytes = _free_bytes(path)
    if free_bytes is not None and free_bytes < needed_bytes:
        raise ArtifactError(
            f"{path} needs {show_bytes(needed_bytes)} but only {show_bytes(free_bytes)} are free",
            fix="free some space or choose another place",
        )


def check_writable(path: str | Path) -> None:
    """Raise ArtifactError where `path` could not be written: before the work, not after it."""
    target = Path(path)
    folder = target if target.is_dir() else _existing_parent(target.absolute().parent)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _cannot_write(target, error) from error


@contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` at success and vanishes on failure.

    An existing non-empty `path` is refused unless `force`, and then replaced only at the end.
    """
    target = Path(path)
    _tell_leftovers(target)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not force:
        raise ConfigError(
            f"{target} exists and is not empty", fix="choose another folder, or pass --force"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield work
        work.chmod(0o777 & ~_umask())
        _replace_folder(work, target)
    except MogulError:
        raise
    except Exception as error:
        place = Path(str(getattr(error, "filename", None) or target)).absolute()
        is_ours = any(place.is_relative_to(ours.absolute()) for ours in (work, target))
        if (is_ours and isinstance(error, OSError)) or _DISK_FULL in str(error):
            raise _cannot_write(target, error) from error
        raise  # of a file that was read, perhaps
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tell_leftovers(target: Path) -> None:
    """Name what a run that was killed left beside `target`: it may be large, and is hidden."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}-*")):
        if left.is_dir():
            say(f"{left} is left of a run that was killed, or belongs to one under way")


def _replace_folder(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        target.rmdir()
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "previous")
    try:
        work.rename(target)
    except OSError:
        (old / "previous").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        work = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.chmod(0o666 & ~_umask())
        work.replace(target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        if work is not None:
            work.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ArtifactError names it when it is missing or damaged."""
    file = Path(path)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist", fix="check the path") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number without end
        raise ArtifactError(
            f"{file} is not valid JSON: {error}", fix="the file is damaged: write or fetch it again"
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {file}: {error.strerror}", fix="check the path"
        ) from error


def read_object(path: str | Path, *, fix: str = "give a model's config.json") -> dict[str, Any]:
    """Read a JSON file that holds one object; ArtifactError names it when it does not."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds no JSON object", fix=fix)
    return content


def read_json_line(line: str, file: str | Path, number: int, *, fix: str) -> Any:
    """Read one line of a file of JSON lines; ArtifactError names file and line at fault."""
    try:
        value = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}, line {number} is no JSON: {error}", fix=fix) from None
    return value
