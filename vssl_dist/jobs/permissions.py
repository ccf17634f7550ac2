"""Write permission of others on files and folders, in their modes and default ACLs."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

_WRITE_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DEFAULT_ACL = "system.posix_acl_default"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_OWNER, _ACL_WRITE = 0x01, 0x02


def is_loose(path: Path, state: os.stat_result) -> bool:
    """Whether others may write a file, a folder, or what will be made in the folder."""
    if state.st_mode & _WRITE_OF_OTHERS:
        return True
    return stat.S_ISDIR(state.st_mode) and _closed(acl := _default_acl(path)) != acl


def close_to_others(path: Path) -> None:
    """Take write permission from others; no error if that fails, `is_loose` then stays true."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        path.chmod(stat.S_IMODE(mode) & ~_WRITE_OF_OTHERS)
        acl = _default_acl(path) if stat.S_ISDIR(mode) else b""
        if (closed := _closed(acl)) != acl:
            os.setxattr(path, _DEFAULT_ACL, closed)


def _default_acl(folder: Path) -> bytes:
    """Return the default ACL of a folder as its bytes; empty where there is none."""
    try:
        return os.getxattr(folder, _DEFAULT_ACL)
    except OSError:
        return b""


def _closed(acl: bytes) -> bytes:
    """Return an ACL in which the owner alone may write.

    Args:
        acl: A version of 4 bytes, then tag, permissions and id of each entry.
    """
    whole = len(acl[4:]) // _ACL_ENTRY.size * _ACL_ENTRY.size
    version, entries = acl[:4], acl[4 : 4 + whole]
    return version + b"".join(
        _ACL_ENTRY.pack(tag, bits if tag == _ACL_OWNER else bits & ~_ACL_WRITE, who)
        for tag, bits, who in _ACL_ENTRY.iter_unpack(entries)
    )
