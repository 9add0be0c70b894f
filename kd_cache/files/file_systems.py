"""What kind of file system a file lies on: some tell nothing of a change, some tell of it late."""

from __future__ import annotations

import os
import re

MEMORY = ("tmpfs", "ramfs")
_NETWORK = re.compile(r"nfs|cifs|smb|9p|ceph|lustre|gpfs|beegfs|afs|gluster|fuse|orangefs|davfs|virtiofs|vboxsf")


def is_network(kind: str) -> bool:
    """Whether other machines may write there; what is mounted through FUSE may be anything."""
    return bool(_NETWORK.match(kind))


def file_systems() -> dict[int, str]:
    """Their kinds by device number, as the system tells them; none where it does not."""
    kinds = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                major, _, minor = before.split()[2].partition(":")
                kinds[os.makedev(int(major), int(minor))] = after.split()[0]
    except (OSError, ValueError, IndexError):
        return {}
    return kinds
