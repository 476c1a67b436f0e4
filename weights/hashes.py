"""SHA-256 of large files, remembered: hashing 3 GB of weights takes seconds, and files of weights seldom change."""

import hashlib
import json
import os
from pathlib import Path

MEMORY = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipadapter" / "sha256.json"
SMALL = 1 << 24  # bytes; up to here a file is hashed in no time


def sha256(path: str | Path) -> str:
    """The hash of a file's content; for a large file that was hashed before, recognised by its place, size and time."""
    status = os.stat(path)
    name, seen = os.path.realpath(path), [status.st_size, status.st_mtime_ns, status.st_ino]
    if status.st_size <= SMALL:
        return digest(path)
    memory = recall()
    if name in memory and memory[name][:-1] == seen:
        return memory[name][-1]
    found = digest(path)
    remember(recall() | {name: [*seen, found]})
    return found


def digest(path: str | Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def recall() -> dict[str, list]:
    try:
        memory = json.loads(MEMORY.read_text())
        return memory if isinstance(memory, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(memory: dict[str, list]) -> None:
    part = MEMORY.with_name(f"{MEMORY.name}.{os.getpid()}")
    try:
        MEMORY.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(memory))
        os.replace(part, MEMORY)
    except OSError:  # a home that cannot be written to: hash anew each time
        part.unlink(missing_ok=True)
