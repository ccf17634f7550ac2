"""Reading shards: against the tar files themselves, and with parts of them broken."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.photos import tiny_dataset
from tests.support.shards import edit_index, edit_manifest, tiny_shards
from vssl_dist.data.store import dataset, handles
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import seal
from vssl_dist.errors import DataError

SIZES = [16, 16, 16, 2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(
        tmp_path_factory.mktemp("data"), samples=50, shard_size=16, suffix="jpg", sides=(32, 60)
    )


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def make_images(folder: Path) -> list[bytes]:
    """The image members of all tars, by Python's own tar reader."""
    images = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".cls"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    images.append(stream.read())
    return images


def flip(folder: Path, sample: int) -> None:
    """Change one byte in the middle of a sample's image."""
    dataset = Dataset.open(folder)
    row = dataset.rows(np.array([sample]))[0]
    shard, _ = dataset.locate(np.array([sample]))
    with (folder / dataset.manifest.shards[int(shard[0])].name).open("r+b") as file:
        file.seek(int(row["offset"] + row["size"] // 2))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_an_id_is_the_row_in_the_concatenated_shards(written: Path) -> None:
    dataset = Dataset.open(written)
    expected = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    actual = zip(*(column.tolist() for column in dataset.locate(np.arange(50))), strict=True)
    assert dataset.shard_sizes.tolist() == SIZES
    assert list(actual) == expected


@pytest.mark.parametrize("bad", [-1, 50, 10**9])
def test_an_id_outside_the_dataset_is_an_index_error(written: Path, bad: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 50\)"):
        Dataset.open(written).read(np.array([0, bad]))


def test_reads_what_tarfile_reads_in_any_order(written: Path) -> None:
    expected = make_images(written)
    ids = np.random.default_rng(0).permutation(50)
    dataset = Dataset.open(written)
    samples = dataset.read_checked(ids)
    assert [image.tobytes() for image in dataset.read(ids)] == [expected[i] for i in ids]
    assert [image.tobytes() for image in samples.data] == [expected[i] for i in ids]
    assert samples.label.tolist() == (ids % 4).tolist()
    assert samples.substitutions == []


def test_a_damaged_sample_is_replaced_by_the_next_intact_one_of_its_shard(folder: Path) -> None:
    expected = make_images(folder)
    for sample in (14, 15, 0):  # the next intact one after 14 is 1: around the end of the shard
        flip(folder, sample)
    samples = Dataset.open(folder).read_checked(np.array([13, 14, 16, 0]))
    assert [image.tobytes() for image in samples.data] == [expected[i] for i in (13, 1, 16, 1)]
    assert samples.label.tolist() == [13 % 4, 1, 0, 1]
    assert [(s.planned, s.used) for s in samples.substitutions] == [(14, 1), (0, 1)]
    assert samples.substitutions[0].reason == "shard-000000.tar row 14: crc32 differs"


def test_a_shard_cut_under_a_running_job_gives_substitutes(folder: Path) -> None:
    dataset = Dataset.open(folder)
    first = dataset.rows(np.array([18]))[0]
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.truncate(int(first["offset"]) + 10)
    samples = dataset.read_checked(np.array([18]))
    assert [(s.planned, s.used) for s in samples.substitutions] == [(18, 16)]
    assert "cut short" in samples.substitutions[0].reason


def test_a_shard_without_an_intact_sample_borrows_from_the_next_cyclically(folder: Path) -> None:
    expected = make_images(folder)
    for sample in (48, 49, 0):
        flip(folder, sample)
    samples = Dataset.open(folder).read_checked(np.array([49, 48]))
    assert [(s.planned, s.used) for s in samples.substitutions] == [(49, 1), (48, 1)]
    assert [image.tobytes() for image in samples.data] == [expected[1], expected[1]]
    assert samples.label.tolist() == [1, 1]


def test_a_substitute_is_looked_for_in_three_more_shards_and_not_in_all(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "train", 12, 2)
    for sample in range(2, 9):
        flip(folder, sample)
    substitutions = Dataset.open(folder).read_checked(np.array([2])).substitutions
    assert [(s.planned, s.used) for s in substitutions] == [(2, 9)]
    flip(folder, 9)
    with pytest.raises(DataError, match="sample 2: not one usable image") as error:
        Dataset.open(folder).read_checked(np.array([2]))
    assert "shard-000001.tar row 0: crc32 differs" in str(error.value)
    for sample in (0, 1, 10, 11):  # all of them
        flip(folder, sample)
    with pytest.raises(DataError, match="sample 11: not one usable image"):
        Dataset.open(folder).read_checked(np.array([11]))


def test_a_substitute_is_looked_for_among_so_many_of_a_shard_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_CANDIDATES_PER_SHARD", 2)
    folder = tiny_shards(tmp_path / "train", 8, 4)
    for sample in (3, 0):
        flip(folder, sample)
    substitutions = Dataset.open(folder).read_checked(np.array([3])).substitutions
    assert [(s.planned, s.used) for s in substitutions] == [(3, 1)]
    flip(folder, 1)
    substitutions = Dataset.open(folder).read_checked(np.array([3])).substitutions
    assert [(s.planned, s.used) for s in substitutions] == [(3, 4)]


def test_a_damaged_index_is_an_error_that_names_it(folder: Path) -> None:
    path = folder / "shard-000002.idx.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=r"shard-000002\.idx\.npy: not the index"):
        Dataset.open(folder).rows(np.array([40]))


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx.npy"])
def test_a_missing_or_short_file_is_refused_on_opening(folder: Path, name: str) -> None:
    path = folder / name
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=f"{name} has 100 bytes instead of"):
        Dataset.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Dataset.open(folder)


def test_opening_says_what_is_missing_and_how_to_make_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder of shards \(make it with"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"name one of them: .*copy"):
        Dataset.open(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="sharding did not finish"):
        Dataset.open(folder)
    (folder / "manifest.json").symlink_to(folder / "elsewhere.json")
    with pytest.raises(DataError, match=r"manifest\.json: links to what is missing"):
        Dataset.open(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "vssl-dist/0"}',
        '{"format": "vssl-dist/1", "shards": 3}',
        '{"format": "vssl-dist/1", "shards": [{"name": "../../etc/passwd"}]}',
        "\x00\x00",
    ],
)
def test_a_damaged_manifest_is_one_line(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="manifest") as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value)


def test_no_byte_of_a_manifest_can_change_unnoticed(folder: Path) -> None:
    path = folder / "manifest.json"
    blob = path.read_bytes()
    for offset in range(0, len(blob), 7):
        path.write_bytes(blob[:offset] + bytes([blob[offset] ^ 1]) + blob[offset + 1 :])
        with pytest.raises(DataError, match=r"manifest\.json"):
            Dataset.open(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    path = folder / "manifest.json"
    contents = json.loads(path.read_bytes())
    contents["shards"][0]["name"] = "../copy/shard-000000.tar"
    path.write_bytes(seal(contents))
    with pytest.raises(DataError, match="odd name"):
        Dataset.open(folder)


def test_the_fingerprint_is_the_digest_of_the_manifest(written: Path, tmp_path: Path) -> None:
    blob = (written / "manifest.json").read_bytes()
    other = tiny_dataset(tmp_path, samples=50, shard_size=16, suffix="jpg", sides=(32, 60), first=1)
    assert Dataset.open(written).fingerprint == hashlib.sha256(blob).hexdigest()
    assert Dataset.open(other).fingerprint != Dataset.open(written).fingerprint


def test_more_shards_than_handles_and_many_threads_read_the_same(written: Path) -> None:
    expected = make_images(written)
    dataset = pickle.loads(pickle.dumps(Dataset.open(written)))
    assert dataset.keep_open(1) == 1
    orders = [np.random.default_rng(seed).permutation(50) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for ids, samples in zip(orders, threads.map(dataset.read_checked, orders), strict=True):
            assert [image.tobytes() for image in samples.data] == [expected[i] for i in ids]


def test_reading_shards_does_not_import_torch() -> None:
    code = (
        "import sys, vssl_dist.data.store.dataset, data_prep.shard; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx.npy"])
def test_a_probe_names_a_shard_whose_length_alone_is_right(tmp_path: Path, name: str) -> None:
    folder = tiny_dataset(tmp_path)
    Dataset.open(folder).probe()
    hurt = folder / name
    hurt.write_bytes(b"\0" * hurt.stat().st_size)
    dataset = Dataset.open(folder)
    with pytest.raises(DataError, match="shard-000001") as error:
        dataset.probe()
    assert "data_prep/verify.py" in str(error.value)
    assert "\n" not in str(error.value)


# What a folder from elsewhere may claim


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(handles, "_RETRY_PAUSES_S", ())
    return tiny_shards(tmp_path / "foreign", 20, 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../shard-000000.tar"},
        {"name": "/etc/shard-000000.tar"},
        {"name": "shard-000000.tar\n"},
        {"name": "shard-000000.tar/../../x"},
        {"name": "shard-\u0660\u0660\u0660\u0660\u0660\u0660.pickle"},
        {"name": "shard-000001.tar"},  # twice
        {"samples": -8},
        {"samples": 0},
        {"samples": 8.0},
        {"samples": "8"},
        {"samples": True},
        {"samples": 2**63},
        {"samples": 10**400},
        {"bytes": 1e308},
        {"bytes": None},
        {"shards": []},
        {"shards": {"a": 1}},
        {"source": 5},
        {"classes": 3},
    ],
    ids=str,
)
def test_a_manifest_that_claims_what_cannot_be_is_one_line(
    foreign: Path, fields: dict[str, object]
) -> None:
    edit_manifest(foreign, **fields)
    with pytest.raises(DataError, match=r"manifest\.json: damaged manifest") as caught:
        Dataset.open(foreign)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "blob",
    [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b'{"format": "vssl-dist/1", "samples": ' + b"9" * 10**5 + b"}",
    ],
    ids=["nested lists", "nested objects", "long number"],
)
def test_a_manifest_made_to_exhaust_the_parser_is_one_line(foreign: Path, blob: bytes) -> None:
    (foreign / "manifest.json").write_bytes(blob)
    with pytest.raises(DataError, match=r"manifest\.json: damaged manifest"):
        Dataset.open(foreign)


def test_a_manifest_beyond_all_measure_or_that_is_no_file_is_not_read(foreign: Path) -> None:
    path = foreign / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse: takes no room on disk
    with pytest.raises(DataError, match=r"manifest\.json: not a file of at most"):
        Dataset.open(foreign)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"manifest\.json: not a file"):
        Dataset.open(foreign)


def rows_of(folder: Path) -> np.ndarray:
    rows: np.ndarray = np.load(folder / "shard-000000.idx.npy", allow_pickle=False)
    return rows


def as_npy(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def boasting(rows: np.ndarray) -> bytes:
    """An index whose header announces 36 TB, with the data of eight rows."""
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (10**12,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + rows.tobytes()


@pytest.mark.parametrize("label", [4, 77, 2**40, -2])
def test_a_label_that_is_no_class_is_one_line(foreign: Path, label: int) -> None:
    rows = rows_of(foreign)
    rows["label"][3] = -1  # none is fine
    rows["label"][5] = label
    edit_index(foreign, as_npy(rows))
    with pytest.raises(DataError, match=rf"npy: row 5 has label {label}, .* 4 classes") as caught:
        Dataset.open(foreign).read_checked(np.array([1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["offset", "size"])
@pytest.mark.parametrize("value", [10**6, 2**63, 2**64 - 1])
def test_an_index_that_points_outside_its_shard_is_one_line(
    foreign: Path, field: str, value: int
) -> None:
    rows = rows_of(foreign)
    rows[field][5] = value
    edit_index(foreign, as_npy(rows))
    dataset = Dataset.open(foreign)
    with pytest.raises(DataError, match=r"idx\.npy: row 5 points outside") as caught:
        dataset.read_checked(np.array([1]))
    assert "\n" not in str(caught.value)


def test_an_index_is_never_unpickled_and_its_header_never_believed(foreign: Path) -> None:
    rows = rows_of(foreign)
    hostile = {
        "objects": as_npy(rows.astype(object), allow_pickle=True),
        "boast": boasting(rows),
        "other fields": as_npy(rows.astype([(name, "<u8") for name in rows.dtype.names or ()])),
        "text": b"\x93NUMPY but nothing else".ljust(len(as_npy(rows)), b"x"),
    }
    for what, blob in hostile.items():
        edit_index(foreign, blob)
        with pytest.raises(DataError, match=r"shard-000000\.idx\.npy") as caught:
            Dataset.open(foreign).read_checked(np.array([1]))
        assert "\n" not in str(caught.value), what


def test_an_index_is_read_without_pythons_parser_which_two_threads_cannot_share(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch")  # CPython 3.11 in threads

    blob = as_npy(rows := rows_of(foreign))
    words, row_bytes = blob[10 : -rows.nbytes].rstrip(), rows.tobytes()
    tight = blob[:8] + (len(words) + 1).to_bytes(2, "little") + words + b"\n" + row_bytes
    expected = Dataset.open(foreign).read_checked(np.arange(8))
    for index in (blob, tight):  # numpy fills headers up with blanks, some versions with others
        edit_index(foreign, index)
        with monkeypatch.context() as patched:
            patched.setattr(ast, "parse", parse)
            samples = Dataset.open(foreign).read_checked(np.arange(8))
        assert [d.tobytes() for d in samples.data] == [d.tobytes() for d in expected.data]


def test_an_index_grown_beyond_measure_under_a_run_is_not_read(foreign: Path) -> None:
    dataset = Dataset.open(foreign)
    with (foreign / "shard-000000.idx.npy").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=f"has {2**40} bytes for 8 samples"):
        dataset.read_checked(np.array([1]))


def test_few_files_stay_open_however_many_shards_there_are(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "many", 60, 1)
    program = f"""
import os, resource
import numpy as np
from pathlib import Path
from vssl_dist.data.store.dataset import Dataset
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
dataset = Dataset.open(Path({str(folder)!r}))
before = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    assert dataset.read_checked(np.arange(60)).substitutions == []
print(len(os.listdir("/proc/self/fd")) - before)
dataset.close()
print(len(os.listdir("/proc/self/fd")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["10", "0"]
