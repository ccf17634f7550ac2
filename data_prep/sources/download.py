"""Fetching an official archive with torchvision's downloader."""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path

from vssl_dist.durable import resolve_trusted_links
from vssl_dist.errors import DataError

_CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
_TIMEOUT_S = 30.0


def fetch_archive(dataset: str, root: Path) -> None:
    """Download the official archive into ``root`` unless it is there with the right md5.

    Only the download is torchvision's: the archive is read in memory and never extracted.

    Raises:
        DataError: There is no network, no space, or the archive is not the official one.
    """
    # Imported here, because torch takes seconds that only a download should cost.
    vision = import_module("vssl_dist.vision")
    vision.torchvision()
    layout = getattr(import_module("torchvision.datasets"), _CLASSES[dataset])
    download = import_module("torchvision.datasets.utils").download_url
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        resolve_trusted_links(root / layout.filename)  # torchvision writes through any link
        root.mkdir(parents=True, exist_ok=True)
        download(layout.url, str(root), filename=layout.filename, md5=layout.tgz_md5)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{layout.url}: cannot be fetched ({reason}): put {layout.filename} into {root} by hand"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
