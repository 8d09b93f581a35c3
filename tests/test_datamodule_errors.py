"""What cannot work is one error that names the field and the fix."""

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_dsv3.config import ConfigError
from lightning_dsv3.data import DeepSeekV3DataModule


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"config": {"weights": {"english": 1, "chines": 1}}}, r"data\.weights\.chines.*did you mean 'chinese'"),
            ({"config": {"weights": {"english": 0.0, "code": 0.0}}}, r"data\.weights.*one must be positive"),
            ({"config": {"weights": {"english": -1.0}}}, r"data\.weights.*must not be negative"),
            ({"config": {"weigths": {}}}, r"data\.weigths.*did you mean 'weights'"),
            ({"batch_size": 0}, r"train\.batch_size=0"),
            ({"sequence_length": 1}, r"train\.sequence_length=1.*at least 2"),
            ({"documents": {}}, "documents={}.*no domains"),
            ({"documents": {"a": []}}, r"documents\['a'\].*no documents"),
            ({"documents": {"a": "one text"}}, r"documents\['a'\].*list of documents"),
            ({"documents": {"a": ["x", " \n"]}}, r"documents\['a'\]\[1\].*empty"),
            ({"documents": {"a": ["x", 3]}}, r"documents\['a'\]\[1\].*int.*str"),
            ({"documents": {"a": ["x", "y\ud800"]}}, r"documents\['a'\]\[1\]: character 1.*surrogate"),
            ({"config": {"weights": {"b": 1}}, "documents": {"a": ["x"]}}, r"data\.weights\.b.*known names: a"),
            (
                {"config": {"weights": {"b": 1}}, "documents": {"a": ["x"], "b": ["y"]}},
                r"documents\['a'\].*data\.weights\.a",
            ),
        ],
    )
    def test_at_construction(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            DeepSeekV3DataModule(**arguments)

    def test_a_vocabulary_out_of_bounds(self, tmp_path):
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path)}, vocab_size=100, documents={"a": ["x", "y"]})
        with pytest.raises(ConfigError, match=r"vocab_size=100.*model\.vocab_size"):
            data.setup()

    def test_a_domain_shorter_than_a_sequence(self, tmp_path):
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path)}, documents={"short": ["a b", "c", "d"]})
        with pytest.raises(ConfigError, match=r"train\.sequence_length=256.*'short'.*data\.weights\.short=0"):
            data.setup()

    def test_a_batch_that_does_not_divide(self, tmp_path):
        texts = [f"document {number}" for number in range(9)]
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path)}, sequence_length=8, documents={"a": texts})
        trainer = L.Trainer(accumulate_grad_batches=3, accelerator="cpu", devices=1, logger=False)
        with pytest.raises(ConfigError, match=r"train\.batch_size=8.*1 processes x 3 .*train\.batch_size=9"):
            trainer.fit(BoringModel(), data)

    def test_batches_to_overfit_on(self, tmp_path):
        texts = [f"document {number}" for number in range(9)]
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path)}, sequence_length=8, documents={"a": texts})
        trainer = L.Trainer(overfit_batches=2, accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0)
        with pytest.raises(ConfigError, match=r"trainer\.overfit_batches=2.*documents="):
            trainer.fit(BoringModel(), data)

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        data = DeepSeekV3DataModule({"cache_dir": str(tmp_path / "file")}, documents={"a": ["x", "y"]})
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.*LIGHTNING_DSV3_CACHE"):
            data.setup()

    def test_domains_of_documents_get_equal_weights(self):
        data = DeepSeekV3DataModule(documents={"b": ["x"], "a": ["y"]})
        assert data.weights == {"b": 1.0, "a": 1.0}
