"""A GGUF file as a Hugging Face directory in fp32, for engines that do not read GGUF."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from teco_kernels.decoder.loader import load_source


def dense_copy(gguf: Path, folder: Path) -> Path:
    """Write the model into `folder`, unless it is there."""
    if not (folder / "config.json").exists():
        source = load_source(gguf)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: source.tensor(name).float().contiguous() for name in source.names()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source.tokenizer.save(folder)
        (folder / "config.json").write_text(json.dumps(source.raw_config | {"torch_dtype": "float32"}))
    return folder
