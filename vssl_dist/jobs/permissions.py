"""Who but its owner may write a file, or what will be made in a folder: its mode, and its ACL."""

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
    """Whether others may write it, or what will be made in it."""
    if state.st_mode & _WRITE_OF_OTHERS:
        return True
    return stat.S_ISDIR(state.st_mode) and _closed(acl := _default_acl(path)) != acl


def close(path: Path) -> None:
    """Take from others that they can write; what cannot be taken is found by looking again."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        path.chmod(stat.S_IMODE(mode) & ~_WRITE_OF_OTHERS)
        acl = _default_acl(path) if stat.S_ISDIR(mode) else b""
        if (closed := _closed(acl)) != acl:
            os.setxattr(path, _DEFAULT_ACL, closed)


def _default_acl(folder: Path) -> bytes:
    """What a folder gives to all that is made in it, beyond the umask; mostly nothing."""
    try:
        return os.getxattr(folder, _DEFAULT_ACL)
    except OSError:
        return b""


def _closed(acl: bytes) -> bytes:
    """An ACL (a version, then tag, permissions and id of each) in which its owner alone writes."""
    head, entries = acl[:4], acl[4 : 4 + len(acl[4:]) // _ACL_ENTRY.size * _ACL_ENTRY.size]
    return head + b"".join(
        _ACL_ENTRY.pack(tag, bits if tag == _ACL_OWNER else bits & ~_ACL_WRITE, who)
        for tag, bits, who in _ACL_ENTRY.iter_unpack(entries)
    )
