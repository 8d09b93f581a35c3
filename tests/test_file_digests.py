"""The content of a source's files is hashed once, and again only when a file may have changed."""

import io
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from test_text_sources import TEXTS, jsonl

from lightning_dsv3.config import ConfigError, SourceConfig
from lightning_dsv3.data import DeepSeekV3DataModule
from lightning_dsv3.data.text_sources import configured_sources

OLD = time.time_ns() - 3600 * 10**9


def fingerprint_of(folder, **arguments):
    config = SourceConfig(domain="en", kind="jsonl", path=str(folder), **arguments)
    return configured_sources([config], folder.parent / "cache")[0][0].fingerprint


def forgetful_fingerprint_of(folder):
    for index in (folder.parent / "cache" / "digests").glob("*.json"):
        index.unlink(missing_ok=True)
    return fingerprint_of(folder)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        write(folder / f"{name}.jsonl", TEXTS)
    return folder


@pytest.fixture
def opened(folder, monkeypatch):
    """Names of the source's files in the order in which they were opened."""
    opened, plain = [], Path.open

    def recording(path, *arguments, **keywords):
        if path.parent == folder:
            opened.append(path.name)
        return plain(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", recording)
    return opened


def write(path, texts, when=OLD):
    with open(path, "wb") as file:  # past the recording
        file.write(jsonl(texts))
    os.utime(path, ns=(when, when))


def index(folder):
    (index,) = (folder.parent / "cache" / "digests").iterdir()
    return index


def test_a_second_start_reads_no_content(folder, opened):
    first = fingerprint_of(folder)
    assert opened == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert fingerprint_of(folder) == first
    assert len(opened) == 3
    # Nor when the files are used in another way, which is another source.
    assert fingerprint_of(folder, limit=3) != first
    assert len(opened) == 3


def test_the_data_module_keeps_digests_in_its_cache(folder, opened):
    source = {"domain": "en", "kind": "jsonl", "path": str(folder)}
    for _ in range(2):
        config = {"sources": [source], "cache_dir": str(folder.parent / "cache")}
        DeepSeekV3DataModule(config, vocab_size=512, sequence_length=8).setup()
        # To be hashed and to be tokenised, both at the first start only.
        assert len(opened) == 6
    assert index(folder).name.startswith("jsonl-")


@pytest.mark.parametrize("same_time", [False, True])
def test_other_content_of_the_same_size_is_noticed(folder, opened, same_time):
    first = fingerprint_of(folder)
    size = (folder / "b.jsonl").stat().st_size
    write(folder / "b.jsonl", TEXTS[::-1], OLD if same_time else OLD + 1)
    assert (folder / "b.jsonl").stat().st_size == size
    assert fingerprint_of(folder) != first
    assert opened[3:] == ["b.jsonl"]


def test_another_file_of_the_same_name_size_and_time_is_noticed(folder):
    first = fingerprint_of(folder)
    write(folder / "new", TEXTS[::-1])
    (folder / "new").replace(folder / "b.jsonl")
    assert fingerprint_of(folder) != first


def test_a_touched_file_is_hashed_again_and_the_fingerprint_stays(folder, opened):
    first = fingerprint_of(folder)
    os.utime(folder / "b.jsonl", ns=(OLD, OLD + 10**9))
    assert fingerprint_of(folder) == first
    assert opened[3:] == ["b.jsonl"]
    assert fingerprint_of(folder) == first
    assert len(opened) == 4


def test_a_file_that_came_or_went_changes_the_fingerprint(folder, opened):
    first = fingerprint_of(folder)
    write(folder / "d.jsonl", TEXTS[:3])
    assert fingerprint_of(folder) != first
    assert opened[3:] == ["d.jsonl"]
    (folder / "d.jsonl").unlink()
    assert fingerprint_of(folder) == first
    assert len(opened) == 4
    assert "d.jsonl" not in index(folder).read_text()


@pytest.mark.parametrize("offset", [0, -(10**9), 3600 * 10**9])
def test_a_file_written_a_moment_ago_is_read_at_every_start(folder, opened, offset):
    """It may be written again within the same tick of the clock, or have its time from another clock."""
    now = time.time_ns() + offset
    write(folder / "b.jsonl", TEXTS, now)
    first = fingerprint_of(folder)
    assert fingerprint_of(folder) == first
    assert opened[3:] == ["b.jsonl"]
    write(folder / "b.jsonl", TEXTS[::-1], now)
    assert fingerprint_of(folder) != first


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(folder, monkeypatch):
    class Changing(io.FileIO):
        def read(self, size=-1):
            content = super().read(size)
            if self.name.name == "b.jsonl" and len(content) == 1 << 11:
                with open(self.name, "r+b") as other:  # what was read already
                    other.write(b"\n")
                os.utime(self.name, ns=(OLD, OLD))
            return content

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Changing(path, mode))
        patch.setattr("lightning_dsv3.data.file_digests._BLOCK", 1 << 11)
        first = fingerprint_of(folder)
    assert "a.jsonl" in index(folder).read_text()
    assert "b.jsonl" not in index(folder).read_text()
    assert fingerprint_of(folder) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\xff\x00",
        lambda content: content[:-20],
        lambda content: b"[]",
        lambda content: b"7",
        lambda content: b'{"format": 1}',
        lambda content: b'{"format": 1, "files": [1]}',
        lambda content: content.replace(b'"format": 1', b'"format": 0'),
        lambda content: content.replace(b'"]', b'00"]'),
        lambda content: content.replace(b'"]', b'", 1]'),
        lambda content: b'{"format": 1, "files": {"x": [1, 2, 3, 4, 5]}}',
    ],
)
def test_a_damaged_index_is_rebuilt(folder, opened, damage):
    first = fingerprint_of(folder)
    whole = index(folder).read_bytes()
    index(folder).write_bytes(damage(whole))
    assert fingerprint_of(folder) == first
    assert len(opened) == 6
    assert index(folder).read_bytes() == whole


def test_an_index_that_cannot_be_kept_is_no_error(folder, opened):
    (folder.parent / "cache").mkdir()
    (folder.parent / "cache" / "digests").write_text("a file where the folder should be")
    assert fingerprint_of(folder) == fingerprint_of(folder)
    assert len(opened) == 6


def test_processes_may_write_it_at_once(folder):
    expected = fingerprint_of(folder)
    with multiprocessing.Pool(3) as pool:
        assert set(pool.map(forgetful_fingerprint_of, [folder] * 30, chunksize=1)) == {expected}
    assert [path.name for path in index(folder).parent.iterdir()] == [index(folder).name]


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    def refused(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]: .*a\.jsonl: cannot be read \(Permission denied\)"):
        fingerprint_of(folder)
