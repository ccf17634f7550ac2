from __future__ import annotations

import pytest
import torch

from vssl_dist.errors import ConfigError
from vssl_dist.jobs.gpu import take_own_gpu, visible_gpus

LISTS = [
    "", "0", "3", "0,1,2", "4, 6", " 1 ,0", "00,1", ",0", "0,,1", "0,-1,2", "-1", "+2,3", "0,0",
    "1,0,1", "NoDevFiles", "none", "1gpu,2ampere", "GPU-8932f937,GPU-45cbf7b3", "GPU-a,1",
    "0,GPU-a", "GPU-a,GPU-a", "MIG-c6d4f1ef,MIG-d1b2", "MIG-GPU-8932/1/0,MIG-GPU-8932/5/0",
    "MIG-a,GPU-b",
]  # fmt: skip


@pytest.mark.parametrize("devices", LISTS)
def test_what_cuda_sees_is_what_torch_says_that_it_sees(
    devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert visible_gpus(devices) == [str(name) for name in torch.cuda._parse_visible_devices()]


def taken(devices: str | None, rank: str, ranks: str = "", present: int | None = None) -> str:
    environ = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    environ |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    take_own_gpu(environ, present)
    assert environ["LOCAL_RANK"] == "0"
    assert environ["LOCAL_WORLD_SIZE"] == ranks
    return environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    "devices", ["4,6,7", " 4, 6 ,7 ", "GPU-4,GPU-6,GPU-7", "MIG-4,MIG-6,MIG-7"]
)
def test_where_all_see_all_each_rank_takes_another(devices: str) -> None:
    names = [name.strip() for name in devices.split(",")]
    own = [taken(devices, str(rank), str(len(names))) for rank in range(len(names))]
    assert own == names
    assert taken(devices, "1", "2") == own[1], "as many or more GPUs than ranks"
    assert taken(devices, "1") == own[1], "a launcher that does not say how many ranks there are"


@pytest.mark.parametrize("rank", ["0", "1", "7"])
@pytest.mark.parametrize("devices", ["0", "3", "GPU-8932f937", "MIG-c6d4f1ef", "2,-1", "5,none"])
def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_number(devices: str, rank: str) -> None:
    assert taken(devices, rank, "8") == devices.partition(",")[0]


def test_without_a_list_the_node_s_gpus_are_shared_out() -> None:
    assert [taken(None, str(rank), "4", present=4) for rank in range(4)] == ["0", "1", "2", "3"]
    assert taken(None, "3", "4", present=None) == "3", "where nobody knows how many there are"
    assert taken(None, "3", "4", present=1) == "0", "a site whose cgroups hide the others"


@pytest.mark.parametrize(
    ("devices", "rank", "ranks", "present", "words"),
    [
        ("0,1", "2", "4", None, "('0,1') shows 2 GPUs to LOCAL_RANK=2, and this node has 4 ranks"),
        ("0,1", "0", "4", None, "('0,1') shows 2 GPUs to LOCAL_RANK=0, and this node has 4 ranks"),
        ("0,1", "2", "", None, "shows 2 GPUs to LOCAL_RANK=2, and this node has 3 ranks"),
        ("GPU-a,GPU-b", "2", "3", None, "('GPU-a,GPU-b') shows 2 GPUs"),
        ("0,1,-1,2", "2", "3", None, "shows 2 GPUs"),
        ("", "0", "1", None, "('') shows no GPU to"),
        ("-1", "0", "1", 8, "('-1') shows no GPU to"),
        ("NoDevFiles", "0", "2", None, "('NoDevFiles') shows no GPU to"),
        (None, "2", "4", 2, "(unset) shows 2 GPUs to LOCAL_RANK=2"),
        (None, "0", "4", 0, "(unset) shows no GPU to"),
        ("0,1", "", "2", None, "LOCAL_RANK='' is not the number"),
        ("0,1", "one", "2", None, "LOCAL_RANK='one' is not the number"),
        ("0,1", "-1", "2", None, "LOCAL_RANK='-1' is not the number"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused_in_one_line_with_the_remedy(
    devices: str | None, rank: str, ranks: str, present: int | None, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        taken(devices, rank, ranks, present)
    said = str(refused.value)
    assert words in said
    assert "\n" not in said
    assert ("CUDA_VISIBLE_DEVICES" in said and "ranks_per_node" in said) or "submit.py" in said
