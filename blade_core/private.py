"""Folders and files that nobody else can have written: what is run from disk comes from these.

Windows answers yes to everything: a user's own folders are private there, and permissions are not
in a file's mode.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path


def why_not_private(folder: Path) -> str | None:
    """Return who else could put a file at `folder`, or None if nobody can.

    As sshd looks at its key files (OpenSSH misc.c, safe_path): neither the folder nor any above
    it may belong to others or be writable for them, unless it is sticky as /tmp is.
    """
    if sys.platform == "win32":
        return None
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        status = path.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        sticky = status.st_mode & 0o1000 and path != folder
        if _others_may_write(status) and not sticky:
            return f"other users may write to {path}"
    return None


def read_private(path: Path) -> bytes:
    """Return the bytes of a file that nobody else can have written.

    Raises:
        OSError: others can, or it cannot be read.
    """
    if sys.platform == "win32":
        return path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_uid not in (0, os.getuid()) or _others_may_write(status):
            raise PermissionError(f"other users may write to {path}")
        return file.read()


def _others_may_write(status: os.stat_result) -> bool:
    if status.st_mode & 0o002:
        return True
    return bool(status.st_mode & 0o020) and status.st_gid not in _own_groups()


@lru_cache
def _own_groups() -> frozenset[int]:
    """root's, and the group that many systems make for each user alone (same name, nobody else):
    there all new folders may be written to by that group."""
    import grp
    import pwd

    with suppress(KeyError):  # as in a container that knows no users
        user = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(user.pw_gid)
        if group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}:
            return frozenset({0, user.pw_gid})
    return frozenset({0})
