"""data.sources: what it reads, how it mixes, and the one error of everything that cannot be read."""

import codecs
import gzip
import json
import sys
import types

import pytest

from lightning_dsv3.config import ConfigError, SourceConfig, load_run_config
from lightning_dsv3.data import DeepSeekV3DataModule
from lightning_dsv3.data.files import cache_folder
from lightning_dsv3.data.text_sources import configured_sources

TEXTS = [f"document {n} 滚滚长江东逝水" + " and on" * (n % 7) for n in range(30)]


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()


def read(path, kind="jsonl", **arguments):
    config = SourceConfig(domain="en", kind=kind, path=str(path), **arguments)
    ((source, _),) = configured_sources([config], cache_folder())
    return [document.text for document in source.read()]


def zstd(content):
    return pytest.importorskip("zstandard", reason="zstandard is not installed").ZstdCompressor().compress(content)


def write_parquet(path, columns):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.table(columns), path)
    return path


class TestReading:
    def test_jsonl_with_a_mark_blank_lines_and_blank_texts(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(codecs.BOM_UTF8 + b'{"text": "a\\nb"}\n\n{"text": " "}\r\n{"text": "c"}')
        assert read(path) == ["a\nb", "c"]

    def test_compressed_jsonl_in_a_folder(self, tmp_path):
        (tmp_path / "deep").mkdir()
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:3], "body"))
        (tmp_path / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[3:6], "body")))
        # Two frames, as parallel compressors write them.
        (tmp_path / "deep" / "c.jsonl.zst").write_bytes(
            zstd(jsonl(TEXTS[6:8], "body")) + zstd(jsonl(TEXTS[8:9], "body"))
        )
        (tmp_path / "notes.md").write_text("not data")
        assert read(tmp_path, field="body") == TEXTS[:9]
        assert read(tmp_path, field="body", limit=4) == TEXTS[:4]

    def test_text_of_a_folder_and_of_a_pattern(self, tmp_path):
        for name in ["b.txt", "a.txt", "c.rst", ".hidden"]:
            (tmp_path / name).write_text(f"text of {name}")
        assert read(tmp_path, "text") == ["text of a.txt", "text of b.txt", "text of c.rst"]
        assert read(tmp_path / "*.txt", "text") == ["text of a.txt", "text of b.txt"]

    def test_parquet(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", {"id": list(range(30)), "body": TEXTS})
        assert read(path, "parquet", field="body") == TEXTS

    def test_the_fingerprint_is_the_content(self, tmp_path):
        def fingerprint():
            config = SourceConfig(domain="en", kind="jsonl", path=str(tmp_path / "a.jsonl"))
            return configured_sources([config], tmp_path)[0][0].fingerprint

        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        before = fingerprint()
        assert fingerprint() == before
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[::-1]))
        assert fingerprint() != before


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Stand in for `datasets`, which is heavy and wants a network."""
        calls = []

        def load_dataset(path, **arguments):
            calls.append((path, arguments))
            if path == "no/such":
                raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
            return ({"content": text} for text in TEXTS)

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        return calls

    def test_a_stream_is_read_once_into_the_cache(self, calls, tmp_path):
        source = {"domain": "en", "kind": "hf", "path": "some/thing", "field": "content", "subset": "zh"}
        source |= {"streaming": True, "limit": 20, "revision": "v1"}
        for offline in (False, True):
            config = {"sources": [source], "cache_dir": str(tmp_path), "offline": offline}
            data = DeepSeekV3DataModule(config, vocab_size=512, sequence_length=8)
            data.setup()
            assert data.sources[0].documents == 20
        arguments = {"name": "zh", "split": "train", "revision": "v1", "streaming": True}
        assert calls == [("some/thing", arguments)]

    def test_offline_says_what_is_missing(self, calls, tmp_path):
        source = {"domain": "en", "kind": "hf", "path": "some/thing"}
        data = DeepSeekV3DataModule({"sources": [source], "cache_dir": str(tmp_path), "offline": True})
        with pytest.raises(ConfigError, match=r"data\.sources\[0\]: some/thing.*data\.offline=false"):
            data.setup()
        assert calls == []

    def test_errors_name_the_data_set_and_the_record(self, calls):
        with pytest.raises(ConfigError, match=r"data\.sources\[0\]: no/such: cannot be read \(.*exist"):
            read("no/such", "hf")
        with pytest.raises(ConfigError, match=r"some/thing: record 1: there is no field 'contents'.*'content'"):
            read("some/thing", "hf", field="contents")


class TestUnreadable:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "there is no text in it"),
            (b"\n \n", "there is no text in it"),
            (jsonl(TEXTS)[:-9], r"record 30: is not JSON.*truncated"),
            (b'{"text": "a"}\n{"txt": "b"}\n', r"record 2: there is no field 'text'.*did you mean 'txt'"),
            (b'{"text": "a"}\n{"text": null}\n', r"record 2: field 'text' is null"),
            (b'{"text": ["a"]}\n', r"record 1: field 'text' is list"),
            (b'["a"]\n', r"record 1: is list, not an object with a field 'text'"),
            (b'{"text": "a"}\n{"text": "\xff"}\n', r"record 2: is not UTF-8 \(byte 10"),
            (b'{"text": "\\ud800"}\n', r"record 1: field 'text' is no text: character 0 .*surrogate"),
        ],
    )
    def test_jsonl(self, tmp_path, content, message):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"data\.sources\[0\]: .*a\.jsonl: {message}"):
            read(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("ending", ["gz", "zst"])
    def test_a_truncated_archive(self, tmp_path, ending):
        content = jsonl(f"{n} {n * n}" for n in range(2000))
        content = gzip.compress(content) if ending == "gz" else zstd(content)
        path = tmp_path / f"a.jsonl.{ending}"
        path.write_bytes(content[:-20])
        with pytest.raises(ConfigError, match=rf"a\.jsonl\.{ending}: record \d+: is (truncated|not JSON)"):
            read(path)
        path.write_bytes(b"not an archive at all")
        with pytest.raises(ConfigError, match=rf"a\.jsonl\.{ending}: record 1: cannot be read"):
            read(path)

    def test_parquet(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", {"body": ["a", None], "number": [1, 2]})
        with pytest.raises(ConfigError, match=r"a\.parquet: there is no field 'text'.*known names: body, number"):
            read(path, "parquet")
        with pytest.raises(ConfigError, match=r"a\.parquet: record 2: field 'body' is null"):
            read(path, "parquet", field="body")
        with pytest.raises(ConfigError, match=r"a\.parquet: record 1: field 'number' is int"):
            read(path, "parquet", field="number")
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ConfigError, match=r"data\.sources\[0\]: .*a\.parquet: cannot be read"):
            read(path, "parquet", field="body")

    def test_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("olé".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"a\.txt: is not UTF-8 \(byte 2"):
            read(tmp_path, "text")
        (tmp_path / "a.txt").write_bytes(b"")
        with pytest.raises(ConfigError, match="there is no text in it"):
            read(tmp_path, "text")

    def test_paths_that_lead_nowhere(self, tmp_path):
        with pytest.raises(ConfigError, match=r"data\.sources\[0\]: path=.*nothing: there is no file; .*directory"):
            read(tmp_path / "nothing")
        with pytest.raises(ConfigError, match=r"there is no file that ends in \.parquet"):
            read(tmp_path, "parquet")

    @pytest.mark.parametrize(
        ("kind", "name", "module"),
        [("jsonl", "a.jsonl.zst", "zstandard"), ("parquet", "a.parquet", "pyarrow"), ("hf", "a/b", "datasets")],
    )
    def test_a_package_that_is_not_installed(self, tmp_path, monkeypatch, kind, name, module):
        for blocked in (module, f"{module}.parquet"):
            monkeypatch.setitem(sys.modules, blocked, None)
        if kind != "hf":
            (tmp_path / name).write_bytes(b"x")
            name = tmp_path / name
        with pytest.raises(ConfigError, match=rf"data\.sources\[0\].*pip install {module}"):
            read(name, kind)


class TestMixture:
    @pytest.fixture
    def make(self, tmp_path):
        for name, letter in {"a": "x", "b": "y", "c": "z"}.items():
            (tmp_path / f"{name}.jsonl").write_bytes(jsonl(f"{letter * 3} {n}" for n in range(40)))
        sources = [
            {"domain": domain, "kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), "weight": weight}
            for domain, name, weight in [("en", "a", 0.6), ("zh", "c", 0.1), ("en", "b", 0.3), ("zh", "a", 0.0)]
        ]

        def make(**config):
            config = {"sources": sources, "cache_dir": str(tmp_path / "cache"), "val_windows": 0} | config
            data = DeepSeekV3DataModule(config, vocab_size=512, sequence_length=8, batch_size=50)
            data.setup()
            return data

        return make

    def letters(self, data, batch):
        """Return which source each row is of."""
        texts = [data.tokenizer.decode(row.tolist()) for row in batch["input_ids"]]
        return [max("xyz", key=text.count) for text in texts]

    def test_sources_have_their_shares(self, make):
        data = make()
        assert data.domains == ["en", "zh"]
        assert data.weights == pytest.approx({"en": 0.9, "zh": 0.1})
        batches = iter(data.train_dataloader())
        counts = dict.fromkeys("xyz", 0)
        for _ in range(20):
            batch = next(batches)
            for letter, domain in zip(self.letters(data, batch), batch["domain"].tolist(), strict=True):
                counts[letter] += 1
                assert data.domains[domain] == ("zh" if letter == "z" else "en")
        assert [counts[letter] / 1000 for letter in "xyz"] == pytest.approx([0.6, 0.3, 0.1], abs=0.05)

    def test_held_out_text_is_of_all_sources_and_of_no_training(self, make):
        data = make()
        held_out = data.heldout_bytes("en") + data.heldout_bytes("en", "test")
        assert b"x" in held_out
        assert b"y" in held_out
        assert b"z" not in held_out
        train = sum(len(part.documents) for part in data._parts)
        kept = sum(len(table) for tables in data._tables.values() for table in tables.values())
        assert kept == 120
        assert train == sum(len(tables["train"]) for tables in data._tables.values())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resume_is_exact(self, make, workers):
        data = make()
        through = iter(data.train_dataloader())
        wanted = [next(through)["input_ids"] for _ in range(5)][3:]
        first = make().train_dataloader()
        batches = iter(first)
        for _ in range(3):
            next(batches)
        second = make(num_workers=workers).train_dataloader()
        second.load_state_dict(first.state_dict())
        batches = iter(second)
        assert all((next(batches)["input_ids"] == batch).all() for batch in wanted)

    def test_the_cache_is_used_until_the_content_changes(self, make, tmp_path, monkeypatch):
        make()
        monkeypatch.setattr("lightning_dsv3.data.text_sources._read_jsonl", None)
        make()
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        with pytest.raises(TypeError):
            make()

    def test_an_error_leaves_nothing_in_the_cache(self, make, tmp_path):
        (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text"')
        with pytest.raises(ConfigError, match=r"data\.sources\[2\]: .*b\.jsonl: record 2"):
            make()
        left = [path.name for path in (tmp_path / "cache" / "tokens").iterdir()]
        assert len(left) == 2
        assert not [name for name in left if "b.jsonl" in name or name.startswith(".partial")]


class TestConfiguration:
    def test_the_grammar(self):
        word = "data.sources=[{domain: en, kind: parquet, path: a/*.parquet, field: body, weight: 0.5}]"
        (source,) = load_run_config([word]).data.sources
        assert source == SourceConfig(domain="en", kind="parquet", path="a/*.parquet", field="body", weight=0.5)

    def test_a_run_s_own_file_reads_back(self, tmp_path):
        config = load_run_config(["data.sources=[{domain: en, kind: hf, path: a/b, streaming: true, limit: 9}]"])
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert load_run_config([f"config={tmp_path / 'config.yaml'}"]) == config

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("{domain: en, knd: jsonl, path: a}", r"data\.sources.*no such key.*did you mean 'kind'"),
            ("{domain: en, kind: jsonl}", "SourceConfig.*path"),
            ("{domain: en, kind: json, path: a}", "kind='json': did you mean 'jsonl'"),
            ("{domain: en, kind: jsonl, path: ''}", "path is empty"),
            ("{domain: en, kind: jsonl, path: a, weight: -1}", r"weight=-1\.0"),
            ("{domain: en, kind: jsonl, path: a, weight: 0}", "every weight is 0"),
            ("{domain: en, kind: jsonl, path: a, limit: 0}", "limit=0"),
            ("{domain: en, kind: text, path: a, streaming: true}", "belong to kind=hf"),
            ("{domain: en, kind: hf, path: a, streaming: true}", "limit: 100000"),
        ],
    )
    def test_an_impossible_source_is_one_error(self, entry, message):
        with pytest.raises(ConfigError, match=message):
            load_run_config([f"data.sources=[{entry}]"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"config": {"weights": {"en": 1.0}}}, r"data\.weights: with data\.sources"),
            ({"documents": {"a": ["x"]}}, r"data\.sources.*documents"),
            ({"config": {"sources": [{"domain": "en", "knd": "hf"}]}}, r"data\.sources\[0\]\.knd.*'kind'"),
            ({"config": {"sources": [{"domain": "en"}]}}, r"data\.sources\[0\]: kind, path"),
        ],
    )
    def test_the_data_module_checks_too(self, arguments, message):
        source = SourceConfig(domain="en", kind="jsonl", path="a")
        config = {"sources": [source]} | arguments.pop("config", {})
        with pytest.raises(ConfigError, match=message):
            DeepSeekV3DataModule(config, **arguments)

    def test_a_source_given_twice(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        source = SourceConfig(domain="en", kind="jsonl", path=str(tmp_path / "a.jsonl"))
        with pytest.raises(ConfigError, match=r"data\.sources\[1\].*twice"):
            configured_sources([source, source], tmp_path / "cache")
