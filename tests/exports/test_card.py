"""A card that anybody may have written is checked as a whole, before anything is made of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.exports import NORMALISE, change, exported
from tests.support.heads import SMALL, exported_branch
from tests.support.photos import three_splits
from vssl_dist.commands import evaluate, export
from vssl_dist.config import CollapseConfig, OodConfig, load
from vssl_dist.errors import ExportError
from vssl_dist.exports.card import (
    CARD_FORMAT,
    Card,
    ExportDescription,
    PortableCard,
    WeightsOrigin,
)
from vssl_dist.exports.read import read_card
from vssl_dist.exports.write import write_export
from vssl_dist.methods import CONFIGS
from vssl_dist.models.heads import GaussianBranch

ROOT = Path(__file__).parents[2]
DIGEST = "ab" * 32
WRONG: list[tuple[str, Any]] = [
    ("format", "vssl-dist/card-2"), ("format", "vssl-dist/1"), ("format", "vssl-dist/card-1\n"),
    ("format", None), ("format", 1), ("format", ["vssl-dist/card-1"]), ("format", "\x1b[2J" * 99),
    ("step", "../../x"), ("step", -1), ("step", True), ("step", 1.0), ("step", math.nan),
    ("step", 10**400), ("step", None),
    ("backbone", ["x"]), ("backbone", "hf-hub:evil/x"), ("backbone", "timm:hf-hub:evil/x"),
    ("backbone", "local-dir:/tmp"), ("backbone", "resnet1"), ("backbone", "../resnet18"),
    ("run", "$(touch x)"), ("run", "a\x1b[2J"), ("run", "a/b"), ("run", ""), ("run", ["a"]),
    ("image_size", 0), ("image_size", 10**9), ("image_size", "32"),
    ("normalise", {"mean": [0, 0, math.nan], "std": [1, 1, 1]}),
    ("normalise", {"mean": [0, 0, 0], "std": [0, 0, 0]}), ("normalise", []),
    ("train", 5), ("train", ""), ("train", "a\0b"), ("train", "a" * 5000), ("val", ["x"]),
    ("sha256", "x"), ("sha256", DIGEST.upper()), ("head_sha256", []), ("online_sha256", "../x"),
    ("head_sha256", None), ("online_sha256", None),
    ("method", ["vje"]), ("method", "a\n# b"), ("branch", "<b>"), ("licence", "a\nb"),
    ("licence", "a" * 2000), ("fingerprint", {}), ("versions", ["1"]), ("versions", {"a": 1}),
    ("metrics", {"a": "b"}), ("metrics", {"a\nb": 1.0}),
    ("config", []), ("config", {"data": []}), ("config", {"data": {"bank": [1]}}),
    ("config", {"data": {"backend": "x"}}), ("config", {"data": {"timeout_s": "x"}}),
    ("config", {"data": {"views": [1]}}), ("config", {"evaluations": 5}),
    ("config", {"evaluations": [{"task": ["knn"]}]}), ("config", {"method": {"name": ["vje"]}}),
    ("config", {"licence": 5}), ("config", json.loads('{"a":' * 60 + "1" + "}" * 60)),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return exported(tmp_path / "run" / "export", tmp_path)[0]


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What both programs say in one line, having written nothing."""
    before = sorted(path.parent.iterdir())
    said = []
    run = str(path.parents[1])
    for program, words in ((evaluate, ["--device", "cpu"]), (export, ["--format", "torch_export"])):
        assert program.main([run, *words]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert said[0].count("\n") == 1
    assert said[0].rstrip("\n").isprintable()
    assert len(said[0]) < 600
    assert said[0].startswith(f"error: {path.with_suffix('.json')}: ")
    assert sorted(path.parent.iterdir()) == before
    return said[0]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k}={v!r:.20}" for k, v in WRONG])
def test_a_card_with_a_value_that_no_training_writes_is_one_line_and_exit_code_2(
    path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    change(path, **{key: value})
    assert f"{key}" in refused(path, capsys)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested beyond reason"),
        (b"[" * 200_000, "nested beyond reason"),
        (b'{"step": 1, "step": 2}', "step stands twice"),
        (b"{" + b'"a": 1, "a\\n": 2, "a\\n": 3' + b"}", "a\\n stands twice"),
        (b'{"step": ' + b"9" * 6000 + b"}", "6000 digits"),
        (b"[]", "lacks everything"),
        (b"null", "lacks everything"),
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"{}", "lacks backbone, image_size, normalise, run, sha256, step, train, val"),
    ],
)
def test_a_card_that_is_no_json_of_ours_is_one_line_and_exit_code_2(
    path: Path, capsys: pytest.CaptureFixture[str], blob: bytes, words: str
) -> None:
    path.with_suffix(".json").write_bytes(blob)
    assert words in refused(path, capsys)


@pytest.mark.parametrize(
    ("make", "words"), [(os.mkfifo, "not a regular file"), (os.mkdir, "not a regular file")]
)
def test_a_card_that_is_no_file_keeps_nobody_waiting(
    path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], words: str
) -> None:
    path.with_suffix(".json").unlink()
    make(path.with_suffix(".json"))
    assert words in refused(path, capsys)


def test_a_runs_own_settings_of_a_task_that_are_none_are_one_line_with_the_file(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(path, config={"evaluations": [{"task": "knn", "k": "x"}]})
    assert evaluate.main([str(path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path.with_suffix('.json')}: config.evaluations: knn.k: ")
    assert said.count("\n") == 1


def test_cards_as_trainings_wrote_them_are_read_whatever_their_folders_are_called(
    path: Path,
) -> None:
    """Of today with all its keys, and of the first version that said its weights' digest."""
    changes = ["name=x", "data.train=a", "evaluations=[{task: knn, temperature: [.inf]}]"]
    cfg = load(ROOT / "configs" / "quickstart.yaml", [*changes, "data.val=b"], methods=CONFIGS)
    card = {
        "run": "a.B-c_1", "step": 0, "method": "vje", "backbone": "timm:resnet18",
        "branch": "teacher", "image_size": 224,
        "normalise": NORMALISE.model_dump(mode="json"), "train": os.fsdecode(b"/caf\xe9 $x/\n"),
        "val": None, "licence": "ours: ask | us # first", "config": cfg.model_dump(mode="json"),
        "fingerprint": DIGEST, "versions": {"torch": "2.9.1+cpu", "commit": "abc-dirty"},
        "metrics": {"loss": math.nan, "images_per_second": 0.0}, "sha256": DIGEST,
        "head_sha256": DIGEST, "online_sha256": DIGEST, "key_of_a_later_version": [1],
    }  # fmt: skip
    place = path.with_suffix(".json")
    place.write_text(json.dumps(card, indent=1))
    assert str(read_card(path).train) == card["train"]
    for later in ("branch", "licence", "fingerprint", "metrics", "head_sha256", "online_sha256"):
        del card[later]
    for backbone in ("resnet50", "resnet10_c16", "vit_small_patch16_224", "wide_resnet50_2"):
        place.write_text(json.dumps(card | {"backbone": backbone}))
        assert read_card(path).backbone == backbone


def test_a_backbone_whose_header_lies_is_refused_by_safetensors(path: Path) -> None:
    from vssl_dist.exports.read import load_export

    name = b'{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}'
    for header in (
        name % (b"F32", b"[1099511627776]", b"[0,4398046511104]"),
        name % (b"F32", b"[-1]", b"[0,4]"),
        name % (b"F99", b"[1]", b"[0,4]"),
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"{}" + b" " * 1000 + b"\xff",
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(ExportError, match="damaged, or not safetensors") as error:
            load_export(path)
        assert "\n" not in str(error.value)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ExportError, match="damaged, or not safetensors"):
        load_export(path)


def test_a_card_of_a_newer_format_says_so_whatever_else_it_holds(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.with_suffix(".json").write_text('{"format": "vssl-dist/card-12", "weights": []}')
    assert "format vssl-dist/card-12, newer than vssl-dist/card-1: update" in refused(path, capsys)


def as_earlier_versions_wrote_it(card: dict[str, Any]) -> dict[str, Any]:
    """The keys of 0.1.0, in their order."""
    keys = [
        "run", "step", "method", "backbone", "branch", "image_size", "normalise", "train", "val",
        "licence", "config", "fingerprint", "versions", "metrics", "head_sha256", "online_sha256",
        "sha256",
    ]  # fmt: skip
    return {key: card[key] for key in keys if key in card}


def test_what_is_written_is_what_earlier_versions_wrote_and_its_format(tmp_path: Path) -> None:
    changes = ["name=x", "data.train=a", "data.val=b", "method.name=vje", "licence='a\tb'"]
    changes += ["evaluations=[{task: knn, temperature: [.inf]}]"]
    cfg = load(ROOT / "configs" / "quickstart.yaml", changes, methods=CONFIGS)
    origin: WeightsOrigin = {"fingerprint": DIGEST, "versions": {"torch": "2.9.1+cpu"}}
    description = ExportDescription.of(cfg, 40, "student", origin, {"loss": math.inf, "a": 1.0})
    branch = GaussianBranch(nn.Linear(3, 4), nn.Linear(4, 10))
    path = tmp_path / "backbone-00000040.safetensors"
    write_export(path, branch, description, {"online": {"weight": torch.ones(2)}})
    text = path.with_suffix(".json").read_text()
    card = json.loads(text)
    earlier = {
        "run": "x",
        "step": 40,
        "method": "vje",
        "backbone": cfg.method.backbone,
        "branch": "student",
        "image_size": cfg.data.image_size,
        "normalise": cfg.data.normalise.model_dump(mode="json"),
        "train": "a",
        "val": "b",
        "licence": "a\\tb",
        "config": cfg.model_dump(mode="json") | {"licence": "a\\tb"},
        "fingerprint": DIGEST,
        "versions": {"torch": "2.9.1+cpu"},
        "metrics": {"loss": math.inf, "a": 1.0},
    }
    earlier |= {key: card[key] for key in ("head_sha256", "online_sha256", "sha256")}
    assert text == json.dumps({"format": "vssl-dist/card-1"} | earlier, indent=1)
    again = Card.read(path.with_suffix(".json"))
    assert json.dumps(again.as_json(), indent=1) == text, "what is read is written again"
    assert again.parts == {"head": card["head_sha256"], "online": card["online_sha256"]}


def test_a_card_of_an_earlier_version_is_evaluated_to_the_same_figures(tmp_path: Path) -> None:
    data = three_splits(tmp_path / "data", foreign=16)
    path, _ = exported_branch(tmp_path / "export", data, SMALL["vssl teacher"])
    ood = OodConfig(ood={"foreign": data / "foreign"}, k=3, bootstrap=2, pairs=1, posteriors=9)
    tasks = [ood, CollapseConfig(pairs=8)]

    def figures() -> list[Any]:
        results = [evaluate.evaluate(path, task) for task in tasks]
        for file in path.parent.glob("*-00000040.json"):
            if file != path.with_suffix(".json"):
                file.unlink()
        return [{key: part for key, part in each.items() if key != "seconds"} for each in results]

    today, place = figures(), path.with_suffix(".json")
    card = json.loads(place.read_text())
    assert card["format"] == "vssl-dist/card-1"
    place.write_text(json.dumps(as_earlier_versions_wrote_it(card), indent=1))
    assert read_card(path).format is None
    assert figures() == today


def test_the_page_on_cards_lists_every_key_as_the_code_has_it() -> None:
    """docs/card.md holds the models' own words."""
    rows = [
        f"| `{name}` | {'always' if field.is_required() else ''} | {field.description} |"
        for model in (Card, PortableCard)
        for name, field in model.model_fields.items()
        if model is Card or name not in Card.model_fields
    ]
    page = (ROOT / "docs" / "card.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    assert table == [row.replace("``", "`") for row in rows], "\n".join(rows)
    assert CARD_FORMAT in page
