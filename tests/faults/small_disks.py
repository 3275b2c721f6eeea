"""Small disks in memory, which can be full; as root, or as a user with `unshare -rm`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PAGE = 4096  # what tmpfs counts in
SIZE = 512  # pages of the disk
REASON = "cannot mount a tmpfs here; as a user: unshare -rm make test-faults"


def mount(*options: str) -> bool:
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def mount_disk(place: Path) -> bool:
    return mount("-t", "tmpfs", "-o", f"size={SIZE * PAGE}", "tmpfs", str(place))


def fill(disk: Path, free_pages: int) -> Path:
    """A file that leaves so much room."""
    ballast = disk / "ballast"
    room = os.statvfs(disk).f_bavail - free_pages
    ballast.write_bytes(bytes(room * PAGE))
    assert os.statvfs(disk).f_bavail == free_pages
    return ballast
