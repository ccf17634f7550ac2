"""Write permission of others on files and folders, in their modes and default ACLs."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

_OTHERS_WRITE_BITS = stat.S_IWGRP | stat.S_IWOTH
_DEFAULT_ACL_XATTR = "system.posix_acl_default"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_OWNER_TAG, _ACL_WRITE_BIT = 0x01, 0x02


def is_writable_by_others(path: Path, path_stat: os.stat_result) -> bool:
    """Whether others may write a file, a folder, or what will be made in the folder."""
    if path_stat.st_mode & _OTHERS_WRITE_BITS:
        return True
    return (
        stat.S_ISDIR(path_stat.st_mode)
        and _owner_writable_acl(acl := _read_default_acl(path)) != acl
    )


def close_to_others(path: Path) -> None:
    """Take write permission from others, or leave `is_writable_by_others` true if that fails."""
    with suppress(OSError):
        path_mode = path.lstat().st_mode
        path.chmod(stat.S_IMODE(path_mode) & ~_OTHERS_WRITE_BITS)
        acl = _read_default_acl(path) if stat.S_ISDIR(path_mode) else b""
        if (closed_acl := _owner_writable_acl(acl)) != acl:
            os.setxattr(path, _DEFAULT_ACL_XATTR, closed_acl)


def _read_default_acl(folder: Path) -> bytes:
    """Return the default ACL of a folder as its bytes; empty where there is none."""
    try:
        return os.getxattr(folder, _DEFAULT_ACL_XATTR)
    except OSError:
        return b""


def _owner_writable_acl(acl: bytes) -> bytes:
    """Return an ACL in which the owner alone may write.

    Args:
        acl: A version of 4 bytes, then tag, permissions and id of each entry.
    """
    entries_bytes = len(acl[4:]) // _ACL_ENTRY.size * _ACL_ENTRY.size
    acl_version, acl_entries = acl[:4], acl[4 : 4 + entries_bytes]
    return acl_version + b"".join(
        _ACL_ENTRY.pack(
            entry_tag,
            permission_bits if entry_tag == _ACL_OWNER_TAG else permission_bits & ~_ACL_WRITE_BIT,
            uid_or_gid,
        )
        for entry_tag, permission_bits, uid_or_gid in _ACL_ENTRY.iter_unpack(acl_entries)
    )
