"""vLLM's plug-in: an attention backend over `paged_attention`, and GPTQ linear layers over `gptq_matmul`.

vLLM calls `register` in each of its processes. That alone changes nothing; each part is chosen by vLLM's own option::

    vllm serve MODEL --attention-backend CUSTOM --quantization teco_gptq
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

_BACKEND = "teco_kernels.integrations.vllm.attention.TecoAttentionBackend"


def register() -> None:
    """Make the backend and the method known to vLLM; nothing where there is no vLLM. May be called again."""
    if find_spec("vllm") is None:
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from teco_kernels.integrations.vllm import gptq  # noqa: F401 (registers its method)

    if not AttentionBackendEnum.CUSTOM.is_overridden():  # another plug-in has only that name, too
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if current_platform.is_cpu():
        from teco_kernels.integrations.vllm.layers import register_layers

        register_layers()
    _let_the_cpu_choose()


def is_our_attention(backend: Any) -> bool:
    """Whether a chosen backend, or None, is CUSTOM, and that is ours and not another plug-in's."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return backend == AttentionBackendEnum.CUSTOM and backend.get_path() == _BACKEND


def _let_the_cpu_choose() -> None:
    """vLLM's platform of CPUs uses its own backend whatever is chosen; let it use this one where it is."""
    from vllm.platforms.cpu import CpuPlatform

    vllm_chooses = CpuPlatform.get_attn_backend_cls
    if getattr(vllm_chooses, "lets_choose", False):
        return

    def choose(cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **options: Any) -> str:
        config = attn_selector_config
        if not is_our_attention(selected_backend):
            path: str = vllm_chooses.__func__(cls, selected_backend, config, *args, **options)
            return path
        from teco_kernels.integrations.vllm.attention import TecoAttentionBackend

        # As vLLM's platforms of GPUs do it; that of CPUs asks no backend.
        reasons = TecoAttentionBackend.validate_configuration(device_capability=None, **config._asdict())
        if reasons:
            raise ValueError(f"attention backend CUSTOM (teco_kernels): {', '.join(reasons)}")
        return _BACKEND

    choose.lets_choose = True  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = classmethod(choose)
