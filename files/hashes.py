"""SHA-256 of large files, remembered: hashing 3 GB of weights takes seconds, and files of weights seldom change."""

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from files.tensors import WeightsError

SMALL = 1 << 24  # bytes; up to here a file is hashed in no time


def sha256(path: str | Path) -> str:
    """The hash of a file's content; for a large file that was hashed before, recognised by its place, size and time.

    Raises:
        WeightsError: missing or not readable.
    """
    try:
        status = os.stat(path)
        if stat.S_ISFIFO(status.st_mode):
            raise WeightsError(f"{path}: a pipe, which can be read once; a file is wanted")
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    name, seen = os.path.realpath(path), [status.st_size, status.st_mtime_ns, status.st_ino]
    if status.st_size <= SMALL:
        return digest(path)
    memory = recall()
    if name in memory and memory[name][:-1] == seen:
        return memory[name][-1]
    found = digest(path)
    remember(recall() | {name: [*seen, found]})
    return found


def sha256_of_several(folder: Path, files: list[Path]) -> str:
    """Made of what `sha256sum` prints of these files of a folder, in order of name."""
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    lines = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def digest(path: str | Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def memory_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ipadapter" / "sha256.json"


def recall() -> dict[str, list]:
    try:
        memory = json.loads(memory_file().read_text())
        return memory if isinstance(memory, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(memory: dict[str, list]) -> None:
    path = memory_file()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(memory))
        os.replace(part, path)
    except OSError:  # a home that cannot be written to: hash anew each time
        with suppress(OSError):
            part.unlink(missing_ok=True)
