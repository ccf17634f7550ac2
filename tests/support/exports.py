"""Exports as a training writes them, and their images read without the package."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vssl_dist.config import Normalisation
from vssl_dist.models.backbones import build_backbone

NORMALISE = Normalisation(mean=(0.5, 0.45, 0.4), std=(0.25, 0.2, 0.3))


def exported(folder: Path, data: Path, *, seed: int = 1, step: int = 40) -> tuple[Path, nn.Module]:
    """A backbone with lived-in batch norm statistics, written as a training writes it."""
    torch.manual_seed(seed)
    backbone, _ = build_backbone("resnet18_c16", 32)
    backbone.train()(torch.randn(64, 3, 32, 32))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"backbone-{step:08d}.safetensors"
    save_file(backbone.state_dict(), path)
    card = {
        "backbone": "resnet18_c16",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "image_size": 32,
        "normalise": NORMALISE.model_dump(mode="json"),
        "step": step,
        "run": "tiny",
        "train": str(data / "train"),
        "val": str(data / "val"),
        "config": {"data": {"backend": "reference"}},
    }
    path.with_suffix(".json").write_text(json.dumps(card))
    return path, backbone.eval()


def change(path: Path, **changes: object) -> None:
    """Change keys of an export's card."""
    card = path.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


def by_hand(folder: Path, normalise: Normalisation = NORMALISE) -> tuple[Tensor, np.ndarray]:
    """All images of a split, straight from the tars with PIL, normalised, and their labels."""
    images, labels = [], []
    for shard_path in sorted(folder.glob("*.tar")):
        with tarfile.open(shard_path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".cls"):
                    labels.append(int(file.read()))
                else:
                    image = Image.open(io.BytesIO(file.read())).convert("RGB")
                    images.append(np.asarray(image, np.float32) / 255)
    pixels = (np.stack(images) - normalise.mean) / normalise.std
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), np.array(labels)
