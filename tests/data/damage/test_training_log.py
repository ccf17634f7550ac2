"""The list of bad images and the budget they may use up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.damage import one_line
from tests.support.others import link_of_nobody, needs_root
from tests.support.ranks import run_ranks
from vssl_dist import dist
from vssl_dist.data.damage.training_log import SubstitutionLog, max_bad_images
from vssl_dist.data.store.dataset import Substitution
from vssl_dist.errors import DataError


def test_the_budget_is_a_share_of_the_images_but_never_less_than_a_few() -> None:
    assert max_bad_images(10**7, 1e-4) == 1000
    assert max_bad_images(100, 1e-4) == 10
    assert max_bad_images(10**7, 0.0) == 0


def entry(position: int, planned: int) -> Substitution:
    return Substitution(planned, planned + 1, "shard-000000.tar row 0: crc32 differs", position)


def test_the_ledger_lists_counts_and_forgets_what_a_resume_does_again(tmp_path: Path) -> None:
    ledger = SubstitutionLog(tmp_path / "run", allowed=2)
    ledger.restore(0)
    assert ledger.totals() == {"substituted_images": 0, "bad_images": 0}
    assert not (tmp_path / "run").exists()
    ledger.record([entry(16, 3), entry(32, 5)])
    ledger.record([entry(80, 3)])  # once more in the next epoch
    assert ledger.totals() == {"substituted_images": 3, "bad_images": 2}
    path = tmp_path / "run" / "substitutions.rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {
        "planned": 5,
        "used": 6,
        "reason": "shard-000000.tar row 0: crc32 differs",
        "position": 32,
    }
    with path.open("a") as file:
        file.write('{"position": 96, "plan')  # torn by a crash
    resumed = SubstitutionLog(tmp_path / "run", allowed=2)
    resumed.restore(32)
    assert resumed.totals() == {"substituted_images": 2, "bad_images": 2}
    assert path.read_text().splitlines() == [json.dumps(line) for line in lines[:2]]
    resumed.check()
    resumed.record([entry(48, 9)])
    assert resumed.totals() == {"substituted_images": 3, "bad_images": 3}  # told in any case
    with pytest.raises(DataError, match=r"3 training images are damaged .* allows 2") as error:
        resumed.check()
    assert "substitutions.rank*.jsonl" in one_line(error)


def test_lines_that_a_disk_has_damaged_are_left_out_at_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "substitutions.rank0.jsonl"
    sound = json.dumps(vars(entry(16, 3))).encode()
    others = (b'{"position": "\xff\xfe", "planned": 4}', b"\xff", b"[" * 10**6, b"[16, 3]",
              b'{"position": 16, "planned": "4"}', b'{"position": 16}')  # fmt: skip
    path.write_bytes(b"\n".join([*others, sound, b""]))
    ledger = SubstitutionLog(tmp_path, allowed=9)
    ledger.restore(20)
    assert ledger.totals() == {"substituted_images": 1, "bad_images": 1}
    assert path.read_bytes() == sound + b"\n"


def keep_books(folder: Path) -> tuple[dict[str, float], str]:
    ledger = SubstitutionLog(folder, allowed=3)
    ledger.restore(100)
    ledger.record([entry(110, 40 + dist.rank()), entry(110, 7)])
    totals = ledger.totals()
    ledger.record([entry(120, 50)] if dist.rank() else [])
    ledger.totals()
    try:
        ledger.check()
    except DataError as error:
        return totals, str(error)
    return totals, ""


def test_all_ranks_count_the_same_and_stop_together_also_when_fewer_go_on(tmp_path: Path) -> None:
    before = ["0", "1", "2"]  # three ranks wrote these, two go on
    for rank in before:
        lines = [entry(90, 7), entry(105, 60)]
        with (tmp_path / f"substitutions.rank{rank}.jsonl").open("w") as file:
            file.writelines(json.dumps(vars(line)) + "\n" for line in lines)
    results = run_ranks(keep_books, 2, tmp_path)
    assert results[0] == results[1]
    totals, error = results[0]
    assert totals == {"substituted_images": 3 + 4, "bad_images": 3}
    assert error.startswith("4 training images are damaged")


def test_a_full_disk_costs_the_list_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    ledger = SubstitutionLog(tmp_path / "run", allowed=5)
    ledger.record([entry(16, 3)])
    assert ledger.totals()["bad_images"] == 1
    assert "1 bad images are not listed" in caplog.text


def test_a_list_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "substitutions.rank1.jsonl")
    with pytest.raises(DataError, match="is no file: remove it"):
        SubstitutionLog(tmp_path, 10).restore(0)


@needs_root
def test_a_list_that_is_another_users_link_is_refused_and_what_it_points_to_stays(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    link_of_nobody(tmp_path / "substitutions.rank0.jsonl", mine)
    with pytest.raises(DataError, match="a link that nobody made"):
        SubstitutionLog(tmp_path, 10).restore(0)
    assert mine.read_text() == "mine"
