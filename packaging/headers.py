"""Headers and link stubs of a package's releases, read from their wheels on the package index.

    python packaging/headers.py torch==2.13.0 build/headers

Reads members of a wheel with HTTP range requests: a torch wheel of 500 MB is not downloaded, and
no torch is installed. A library becomes a stub that defines the same symbols and no code, which is
all that linking needs. A folder that is complete is left as it is.
"""

import argparse
import io
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

WANTED = {"torch": "torch/include/", "jaxlib": "jaxlib/include/"}
LIBRARIES = {"torch": ("c10", "torch_cpu"), "jaxlib": ()}


class RemoteFile(io.RawIOBase):
    """A seekable file behind a URL whose server answers range requests."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        data = self.part(self.at, min(self.at + len(buffer), self.size))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def part(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{end - 1}"})
        data = b""
        for attempt in (1, 2, 3):
            try:
                with urllib.request.urlopen(request, timeout=180) as answer:
                    if answer.status != 206:
                        sys.exit(f"torchcall: {self.url}: the server has no range requests")
                    data = answer.read()
                    if len(data) == end - start:
                        return data
            except OSError:
                if attempt == 3:
                    raise
        sys.exit(f"torchcall: {self.url}: the server sends {len(data)} of {end - start} bytes")


def find_wheel(name: str, version: str) -> tuple[str, int]:
    """The address and size of a release's Linux wheel. Its headers are the same for all Pythons."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(
        f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        files = json.load(answer)["files"]
    pattern = rf"{name}-{re.escape(version)}-cp312-cp312-manylinux\w*_{platform.machine()}\.whl"
    for file in files:
        if re.fullmatch(pattern, file["filename"]):
            return file["url"], file["size"]
    sys.exit(f"torchcall: {index} has no {name} {version} for {platform.machine()}")


def write_stub(library: Path) -> None:
    """Replaces a shared library by one with its name and its symbols, and nothing else."""
    listing = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library], capture_output=True, text=True, check=True
    ).stdout
    kinds = {}
    for line in listing.splitlines():
        match line.split():
            case [_, _, _, kind, _, _, section, name] if section.isdigit():
                kinds[name.split("@")[0]] = "tls_object" if kind == "TLS" else "object"
    plain = sorted(name for name, kind in kinds.items() if kind == "object")
    thread_local = sorted(kinds.keys() - set(plain))
    source = library.with_suffix(".s")
    text = [".data"]
    text += [f'.globl "{name}"\n.type "{name}", @object\n"{name}":' for name in plain]
    text += ['.section .tdata,"awT",@progbits']
    text += [f'.globl "{name}"\n.type "{name}", @tls_object\n"{name}":' for name in thread_local]
    source.write_text("\n".join(text) + "\n.byte 0\n")
    subprocess.run(
        ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{library.name}", source, "-o", library],
        check=True,
    )
    source.unlink()


def unpack(remote: RemoteFile, name: str, folder: Path) -> None:
    """Unpacks the wanted members. Headers that follow each other in the wheel are read at once."""
    with zipfile.ZipFile(io.BufferedReader(remote, 1 << 20)) as wheel:
        members = sorted(wheel.infolist(), key=lambda member: member.header_offset)
    libraries = {f"{name}/lib/lib{library}.so" for library in LIBRARIES[name]}
    ends = [member.header_offset for member in members[1:]] + [remote.size]
    blocks: list[list[tuple[zipfile.ZipInfo, int]]] = [[]]
    for member, end in zip(members, ends, strict=True):
        wanted = member.filename.startswith(WANTED[name]) and not member.is_dir()
        if wanted or member.filename in libraries:
            blocks[-1].append((member, end))
        elif blocks[-1]:
            blocks.append([])
    for block in filter(None, blocks):
        start = block[0][0].header_offset
        data = remote.part(start, block[-1][1])
        for member, end in block:
            with zipfile.ZipFile(_as_archive(member, data, start, end)) as one:
                one.extractall(folder)


def _as_archive(member: zipfile.ZipInfo, data: bytes, start: int, end: int) -> io.BytesIO:
    """A zip archive of one member, from its bytes in the remote one."""
    body = data[member.header_offset - start : end - start]
    name = member.filename.encode()
    directory = struct.pack(
        "<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, member.compress_type, 0, 33, member.CRC,
        member.compress_size, member.file_size, len(name), 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    end_record = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory) + len(name), len(body), 0
    )
    # The local header repeats the flags; those of streamed members do not matter here.
    return io.BytesIO(body + directory + name + end_record)


def fetch(requirement: str, cache: Path) -> Path:
    """The folder of `name==version`'s headers and stubs below `cache`."""
    name, version = requirement.split("==")
    folder = cache / f"{name}-{version}"
    if folder.exists():
        return folder
    url, size = find_wheel(name, version)
    print(f"torchcall: {requirement}: reading the headers from the wheel", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        unpack(RemoteFile(url, size), name, part)
        for library in LIBRARIES[name]:
            write_stub(part / name / "lib" / f"lib{library}.so")
        (part / name).rename(folder)
    finally:
        shutil.rmtree(part)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirement")
    parser.add_argument("cache", type=Path)
    arguments = parser.parse_args()
    print(fetch(arguments.requirement, arguments.cache))
