"""Fetching an official archive with torchvision's downloader."""

from __future__ import annotations

import socket
from importlib import import_module
from pathlib import Path

from vssl_dist.durable import resolve_trusted_links
from vssl_dist.errors import DataError

_TORCHVISION_CLASS_NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
_DOWNLOAD_TIMEOUT_S = 30.0


def fetch_archive(dataset: str, root: Path) -> None:
    """Download the official archive into ``root`` unless it is there with the right md5.

    Only the download is torchvision's: the archive is read in memory and never extracted.

    Raises:
        DataError: There is no network, no space, or the archive is not the official one.
    """
    # Imported here, because torch takes seconds that only a download should cost.
    vision_module = import_module("vssl_dist.vision")
    vision_module.torchvision()
    dataset_class = getattr(
        import_module("torchvision.datasets"), _TORCHVISION_CLASS_NAMES[dataset]
    )
    download_url = import_module("torchvision.datasets.utils").download_url
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        resolve_trusted_links(root / dataset_class.filename)  # torchvision writes through any link
        root.mkdir(parents=True, exist_ok=True)
        download_url(
            dataset_class.url, str(root), filename=dataset_class.filename, md5=dataset_class.tgz_md5
        )
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{dataset_class.url}: cannot be fetched ({reason}): "
            f"put {dataset_class.filename} into {root} by hand"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
