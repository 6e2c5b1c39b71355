"""Commands that serve a model: over HTTP, and by Triton Inference Server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from teco_kernels.cli.command import Threads, app
from teco_kernels.cli.model import (
    Activation,
    CacheDtype,
    CacheMemory,
    Dtype,
    MaxModelLen,
    Model,
    RecycleHead,
    load_model,
)

_LOOPBACK = "127.0.0.1", "localhost", "::1"


@app.command()
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TECO_API_KEY", help="What clients must send as bearer token.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients may address the server; may be given several times, * for any."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name; that of its file if not given.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most answers computed at a time.")] = 64,
    max_concurrent_requests: Annotated[int, typer.Option(min=1, help="Most requests that run or wait.")] = 128,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt.")] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body of a request.")] = 1 << 20,
    max_connections: Annotated[int, typer.Option(min=1, help="Most connections, idle ones included.")] = 512,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_dtype: CacheDtype = "auto",
    kv_cache_memory: CacheMemory = None,
    recycle_head: RecycleHead = "auto",
    gptq_activation: Activation = "int8",
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's and TGI's servers do; a page to try it is at /."""
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ValueError(f"serve: {', '.join(missing)} not installed: pip install 'teco_kernels[serve]'")
    llm = load_model(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        recycle_head=None if recycle_head == "none" else recycle_head,
        gptq_activation=gptq_activation,
        num_threads=threads,
    )
    from teco_kernels.decoder.async_engine import AsyncEngine
    from teco_kernels.integrations.http import Settings
    from teco_kernels.integrations.http import serve as serve_http

    hosts = allowed_host or ([*_LOOPBACK[:2], "[::1]"] if host in _LOOPBACK else ["*"])
    settings = Settings(
        served_model_name or (model.resolve().name if model.is_dir() else model.stem),
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        allowed_hosts=tuple(hosts),
        max_connections=max_connections,
    )
    with llm:
        serve_http(AsyncEngine(llm, max_concurrent_requests=max_concurrent_requests), settings, host=host, port=port)


@app.command()
def triton_repository(
    model: Model,
    repository: Annotated[Path, typer.Argument(help="The folder of models; made if there is none.")],
    name: Annotated[str | None, typer.Option(help="The model's name; that of its file if not given.")] = None,
    decoupled: Annotated[
        bool,
        typer.Option(help="Let clients stream, by Triton's streaming calls; without, they use its plain ones."),
    ] = True,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most answers computed at a time.")] = 64,
    max_concurrent_requests: Annotated[int, typer.Option(min=1, help="Most requests that run or wait.")] = 128,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    kv_cache_dtype: CacheDtype = "auto",
    kv_cache_memory: CacheMemory = None,
    recycle_head: RecycleHead = "auto",
    gptq_activation: Activation = "int8",
    threads: Threads = None,
) -> None:
    """Write a model for Triton Inference Server's Python backend into a repository."""
    from teco_kernels.integrations.triton_server import add_model

    folder = add_model(
        repository,
        model,
        name=name,
        decoupled=decoupled,
        max_num_seqs=max_num_seqs,
        max_concurrent_requests=max_concurrent_requests,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory=kv_cache_memory,
        recycle_head=None if recycle_head == "none" else recycle_head,
        gptq_activation=gptq_activation,
        num_threads=threads,
    )
    typer.echo(f"wrote {folder}")


@app.command()
def triton_server(
    repository: Annotated[Path, typer.Argument(help="The folder of models.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Options of tritonserver, after --.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default only this machine reaches it.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
) -> None:
    """Run Triton Inference Server, that of the package nvidia-pytriton or one that is installed, on a repository."""
    if not repository.is_dir():
        raise FileNotFoundError(2, "No such directory", str(repository))
    from teco_kernels.integrations.triton_server import run_server

    ports = http_port, grpc_port, metrics_port
    raise typer.Exit(run_server(repository, host=host, ports=ports, arguments=arguments or ()))
