"""A small model and a server of it, for each file of tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import random_model, save_model

from teco_kernels import LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(save_model(tmp_path_factory.mktemp("model"), random_model()), max_num_seqs=8)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Any]:
    from http_server import KEY, serving  # here: where something is not installed, this import skips

    with serving(llm, api_key=KEY, max_body_bytes=20_000) as server:
        yield server


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    """OpenAI's."""
    import openai
    from http_server import KEY

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
