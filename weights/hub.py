"""Files under a name (`weights/presets.py`): the local cache of the hub, or a download into it.

What is in the cache is used as it is, without a look at the network. Other tools share the cache, and the environment
variables that say where it is: HF_HUB_CACHE, or HF_HOME.
"""

import errno
import os
import shutil
from pathlib import Path

from files.tensors import WeightsError
from weights.diffusers import model_sha256
from weights.presets import PRESETS, Preset

TREE = Path(__file__).parent.parent


def cache() -> Path:
    """The folder of the hub's cache."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expanduser(os.path.expandvars(named or os.path.join(home, "hub"))))


def cached(preset: Preset) -> Path | None:
    """Where a preset's file lies on this machine: in its own revision, or else in the one that was fetched last."""
    return TREE / preset.file if preset.repo is None else in_cache(preset)


def in_cache(preset: Preset) -> Path | None:
    snapshots = cache() / f"models--{preset.repo.replace('/', '--')}" / "snapshots"
    pinned = snapshots / str(preset.revision) / preset.file
    found = [path for path in snapshots.glob(f"*/{preset.file}") if path.is_file()]
    return pinned if pinned in found else max(found, key=os.path.getmtime, default=None)


def fetch(preset: Preset) -> Path:
    """A preset's file, downloaded where it is not in the cache yet, with the hub's own progress bar on stderr.

    Where its SHA-256 is known, that is compared (`files.hashes` remembers it), whoever put the file there.

    Raises:
        WeightsError: not in the cache and not to be had, and why; another content than the published one.
    """
    path = cached(preset) or download(preset)
    if preset.sha256 and (found := model_sha256(path)) != preset.sha256:
        told = f"not the published {preset.name}, its SHA-256 is {found[:10]}..., not {preset.sha256[:10]}..."
        mend = f"delete it and fetch it anew, or trust it: `{preset.kind}` {path}"
        raise WeightsError(f"{os.path.realpath(path)}: {told}: {mend}")
    return path


def download(preset: Preset) -> Path:
    """Fetch a file into the cache. What is broken off, also by Ctrl-C, leaves nothing that `cached` would find.

    Raises:
        WeightsError: why it cannot be had, and what to do.
    """
    folder = cache()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url  # slow to import

        if not constants.HF_HUB_OFFLINE:  # of one request the error comes at once, the download tries for half a minute
            get_hf_file_metadata(hf_hub_url(preset.repo, preset.file, revision=preset.revision))
        if shutil.disk_usage(nearest).free < preset.megabytes * 10**6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Path(hf_hub_download(preset.repo, preset.file, revision=preset.revision, cache_dir=folder))
    except Exception as error:  # noqa: BLE001, the hub's HTTP library, so its errors, differ between its versions
        raise WeightsError(
            f"`{preset.kind}` {preset.name}: not in {folder}, and {reason(error, preset)}; "
            f"or give a file: `{preset.kind}` FILE"
        ) from None


def reason(error: Exception, preset: Preset) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: fetch it once without that"
    if isinstance(error, errors.GatedRepoError):
        return f"{preset.repo} is gated: accept its terms there with an account of yours, then run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the repository {preset.repo} is gone or not public"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{preset.repo} has no revision {preset.revision} any more"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{preset.repo} has no {preset.file} any more"
    text = (str(error).splitlines() or [""])[0]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return f"the disk is full, {preset.megabytes} MB are wanted: make room, or set HF_HOME to another disk"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "that cannot be written to: set HF_HOME to a folder of yours"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub does not give it now ({text[:120]}): try again later"
    return f"it cannot be reached ({type(error).__name__}: {text[:120]}): fetch it once with a network"


def table() -> str:
    """All presets by the argument that takes them: size, whether the file is here, the families they go with, what they bring, a note."""
    lines = []
    for kind in dict.fromkeys(preset.kind for preset in PRESETS.values()):
        lines.append(f"{f'`{kind}`':24}{'size':>8}  here  {'for':22}brings")
        for preset in (preset for preset in PRESETS.values() if preset.kind == kind):
            size = f"{preset.megabytes / 1000:.1f} GB" if preset.megabytes >= 1000 else f"{preset.megabytes} MB"
            here = "yes" if cached(preset) else "no"
            brings = ", ".join(filter(None, (preset.base, preset.adapter, preset.image_encoder)))
            row = f"  {preset.name:22}{size:>8}  {here:4}  {', '.join(row.name for row in preset.families):22}{brings:15}{preset.note}"
            lines.append(row.rstrip())
        lines.append("")
    return "\n".join(
        [*lines, f"What is not here is fetched into {cache()}. Repositories and hashes: weights/presets.py"]
    )
