"""Caches of compiled code: where they are, how large, and how to clear them."""

import getpass
import os
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from torchcall._doctor.report import Section, imported, one_line

_SECONDS = 0.3  # for counting one cache
_LEAST_FREE = 100 * 2**20


def probe(section: Section) -> None:
    """Reports each cache; one that cannot be written is a problem."""
    for name, (label, folder, variable) in caches().items():
        if folder is None:
            section.values[name] = None
            section.show(label, f"none ({variable} sets it)")
            continue
        size, complete = size_of(folder)
        section.values[name] = {
            "folder": str(folder),
            "bytes": size,
            "complete": complete,
            "clear": f"rm -r {shlex.quote(str(folder))}",
        }
        at_least = "" if complete else "at least "
        section.show(label, f"{folder} ({at_least}{size / 2**20:.1f} MiB)")
        if size:
            section.show("", f"clear: rm -r {shlex.quote(str(folder))}")
        if (reason := unusable(folder)) is not None:
            section.problem(
                f"{label}: {folder} cannot be used: {reason}",
                f"export {variable}={shlex.quote(tempfile.gettempdir())}/torchcall-{_user()}",
            )


def caches() -> dict[str, tuple[str, Path | None, str]]:
    """The label of each cache, its folder, and the variable that moves it."""
    packages, programs = torchcall_folders()
    jax = imported("jax")
    of_jax = getattr(getattr(jax, "config", None), "jax_compilation_cache_dir", None)
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return {
        "packages": ("packages", packages, "TORCHCALL_CACHE"),
        "programs": ("programs of commands", programs, "TORCHCALL_CACHE"),
        "jax": ("JAX's programs", Path(of_jax) if of_jax else None, "JAX_COMPILATION_CACHE_DIR"),
        "inductor": (
            "torch's compiler",
            # As torch._inductor has it, whose import takes a second.
            Path(inductor or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"),
            "TORCHINDUCTOR_CACHE_DIR",
        ),
    }


def torchcall_folders() -> tuple[Path | None, Path | None]:
    """The folders of packages and of JAX programs; None if torch or platformdirs is missing."""
    folder: Any = imported("torchcall._compile._folder")
    if folder is None:
        return None, None
    return folder.cache_folder(), folder.cache_folder("programs")


def size_of(folder: Path) -> tuple[int, bool]:
    """Bytes of the files below a folder, and whether all were counted in time."""
    end = time.monotonic() + _SECONDS
    size, complete, left = 0, True, [str(folder)]
    while left:
        if time.monotonic() > end:
            return size, False
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        size += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
        except OSError:
            complete = False
    return size, complete


def unusable(folder: Path) -> str | None:
    """Why files cannot be stored in a folder, which need not exist yet; None if they can."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            return f"{existing} is not a folder"
        os.listdir(existing)
        tempfile.TemporaryFile(dir=existing).close()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return one_line(error)
    if free < _LEAST_FREE:
        return f"{free / 2**20:.0f} MiB are free"
    return None


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no such user: some containers
        name = str(os.getuid())
    return re.sub(r'[\\/:*?"<>|]', "_", name)
