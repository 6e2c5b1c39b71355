"""Writes models for the Python backend: a configuration, and a module that imports this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teco_kernels.integrations.triton_server.protocol import INPUTS, OUTPUTS, TensorSpec

OPTIONS: dict[str, type[int] | type[str]] = {
    "dtype": str,
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "block_size": int,
    "kv_cache_dtype": str,
    "kv_cache_memory": int,
    "recycle_head": str,
    "num_threads": int,
    "gptq_activation": str,
    "quantization": str,
    "max_concurrent_requests": int,
}
"""Of `LLM` and `AsyncEngine`; the parameters that a model's configuration may have beside ``model``."""

_MODULE = '''"""Served by teco_kernels; what it is told stands in config.pbtxt."""

from teco_kernels.integrations.triton_server.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def add_model(
    repository: str | Path,
    model: str | Path,
    *,
    name: str | None = None,
    decoupled: bool = True,
    **options: int | str | None,
) -> Path:
    """Write a model into a repository, which is made if there is none.

    Parameters
    ----------
    repository : str or Path
    model : str or Path
        A Hugging Face folder or a ``.gguf`` file, which stays where it is.
    name : str, optional
        What clients call the model; the name of its folder or file when not given.
    decoupled : bool
        Whether a request may have several responses. Clients can stream then, and must ask by Triton's streaming calls;
        otherwise by its plain ones.
    **options
        Of `OPTIONS`; None is as good as nothing.

    Returns
    -------
    Path
        The model's folder.

    Raises
    ------
    FileNotFoundError
        There is no such model.
    FileExistsError
        The repository has a model of that name.
    ValueError
        Naming the option.
    """
    path = Path(model).resolve()
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(model))
    if name is None:
        name = path.name if path.is_dir() else path.stem
    if not name or Path(name).name != name:
        raise ValueError(f"name: expected one that a folder may have, got {name!r}")
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in OPTIONS:
            raise ValueError(f"{key}: no such option; there are {', '.join(OPTIONS)}")
        if type(value) is not OPTIONS[key]:
            raise ValueError(f"{key}: expected {OPTIONS[key].__name__}, got {value!r}")
    if given.get("recycle_head", "auto") not in ("auto", "lookup"):
        given["recycle_head"] = str(Path(str(given["recycle_head"])).resolve())
    folder = Path(repository) / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(_MODULE)
    (folder / "config.pbtxt").write_text(_config(name, decoupled, {"model": str(path), **given}), encoding="utf-8")
    return folder


def read_options(parameters: Mapping[str, Mapping[str, str]]) -> tuple[Path, dict[str, Any]]:
    """The model's path and its options, out of the parameters of a configuration.

    Names in capitals are the backend's own, and ignored. ValueError naming what is wrong.
    """
    values = {key: entry["string_value"] for key, entry in parameters.items() if not key.isupper()}
    if "model" not in values:
        raise ValueError("config.pbtxt: expected a parameter 'model', the path of the model; got none")
    path = Path(values.pop("model"))
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key not in OPTIONS:
            raise ValueError(f"config.pbtxt: no parameter {key!r}; there are model, {', '.join(OPTIONS)}")
        try:
            options[key] = OPTIONS[key](value)
        except ValueError:
            raise ValueError(f"config.pbtxt: expected an integer as parameter {key!r}, got {value!r}") from None
    return path, options


def _config(name: str, decoupled: bool, parameters: Mapping[str, int | str]) -> str:
    # One instance: it computes all its requests together, and a second would only have its own copy of the weights.
    # No batches: requests are of different lengths, and the engine batches them token by token.
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        f"model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}",
        "instance_group [ { kind: KIND_MODEL, count: 1 } ]",
    ]
    lines += [f"input [ {_tensor(key, spec)}, optional: true }} ]" for key, spec in INPUTS.items()]
    lines += [f"output [ {_tensor(key, spec)} }} ]" for key, spec in OUTPUTS.items()]
    lines += [
        f"parameters {{ key: {_quoted(key)}, value {{ string_value: {_quoted(str(value))} }} }}"
        for key, value in parameters.items()
    ]
    return "\n".join([*lines, ""])


def _tensor(name: str, spec: TensorSpec) -> str:
    return f"{{ name: {_quoted(name)}, data_type: {spec.data_type}, dims: [ {spec.size} ]"


def _quoted(text: str) -> str:
    """As protobuf's text format has it, which escapes as JSON does."""
    return json.dumps(text, ensure_ascii=False)
