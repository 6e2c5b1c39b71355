"""`LLM`: a model, its cache and its engine behind the interface of vLLM's class of that name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from teco_kernels.decoder.config import ModelConfig
from teco_kernels.decoder.engine import Engine
from teco_kernels.decoder.kv_cache import CACHE_DTYPES
from teco_kernels.decoder.loader import Source, load_source
from teco_kernels.decoder.rank import DTYPES, RankOptions, make_cache, make_model, read_ends, registered_bytes, serve
from teco_kernels.decoder.ranks import Ranks
from teco_kernels.decoder.recycle_head import RecycleHeadTensors, shipped_recycle_head
from teco_kernels.decoder.recycle_module import RecycleModule
from teco_kernels.decoder.recycler import Recycler
from teco_kernels.decoder.sampling_params import RequestError, RequestOutput, SamplingParams
from teco_kernels.decoder.shard import Shard
from teco_kernels.decoder.weights import Quantization
from teco_kernels.ops.gptq import Activation
from teco_kernels.parallel.communicator import DEFAULT_TIMEOUT, CommunicatorError

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

_DEFAULT_CACHE_MEMORY = 1 << 30


class LLM:
    """A language model that answers prompts.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory (plain, GPTQ or AWQ weights in safetensors) or a ``.gguf`` file.
    dtype : str or torch.dtype
        Of activations and unquantised weights: "float32" or "float", "float16" or "half", "bfloat16"; "auto" is float32
        on a CPU.
    tensor_parallel_size : int
        Ranks among which the model is cut, see docs/tensor-parallel.md: so many processes less one are started on this
        host, each with its part of the weights and of the cache. Where torch.distributed is initialised, or torchrun
        has started this process, its ranks are used: all of them make the same `LLM`, which returns on rank 0 only, and
        exits the others when it is done.
    max_model_len : int, optional
        Most tokens of a prompt and its answer; the model's own limit when not given.
    max_num_seqs : int
        Most answers computed at a time.
    max_num_batched_tokens : int, optional
        Most tokens per step, 512 when not given; longer prompts are computed in chunks.
    block_size : int
        Tokens per KV block.
    kv_cache_dtype : str
        "fp32", "fp16", "bf16", "int8" or "fp8", or as vLLM calls them, "float16", "bfloat16", "fp8_e4m3"; "auto" is
        `dtype`.
    kv_cache_memory : int, optional
        Bytes for the KV cache, of all ranks together, 1 GiB when not given. Never takes more than `max_num_seqs`
        longest requests need; memory is used as blocks are first written.
    recycle_head : str or Path, optional
        Guess tokens to come, and let each step verify its guesses along with the next token: the tokens are those of
        plain decoding, greedy and sampled, in fewer steps. "lookup": from what the text has said before. A folder that
        `train_recycle` has made: with this head too, where lookup has nothing to say. "auto": with the head that the
        package has for this model, if any.
    recycle_verify : bool
        False, with a head: believe it without asking the model, every other token, as RecycleGPT does. The text is no
        longer the model's, and depends on the company that it is computed in: see docs/recycling.md. Requests whose
        parameters adjust logits, or ask for log-probabilities, are decoded plainly.
    num_threads : int, optional
        Sets ``torch.set_num_threads``, which the operators follow; for the whole process, and on every rank. When not
        given, the ranks that are started here share out the threads that there are.
    gptq_activation : {"int8", "exact"}
        How quantised layers treat their input, see `gptq_matmul`. "int8" computes in integers, several times faster,
        and moves the log-probabilities less than rounding the weights to 4 bits did; "exact" is for comparisons.
    quantization : {"keep", "dequantize"}
        "keep" runs quantised matrices as they are: those of GPTQ and AWQ checkpoints, and those that a GGUF file has in
        Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 (its other formats are dequantised). "dequantize" makes all of them dense: the
        same weights in more memory, for comparisons.
    tensor_parallel_timeout : float
        Seconds that ranks wait for one another before they give up.

    Raises
    ------
    ValueError
        Naming file, tensor or argument.
    CommunicatorError
        A rank could not be started, has ended, or did not come in time; also out of every later method.

    Examples
    --------
    >>> llm = LLM("model/")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    ' Paris.'
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        kv_cache_dtype: str = "auto",
        kv_cache_memory: int | None = None,
        recycle_head: str | Path | None = None,
        recycle_verify: bool = True,
        num_threads: int | None = None,
        gptq_activation: Activation = "int8",
        quantization: Quantization = "keep",
        tensor_parallel_timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        compute_dtype = _choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
        dtype_name = str(compute_dtype).removeprefix("torch.")
        cache_dtype = _choice("kv_cache_dtype", kv_cache_dtype, {"auto": dtype_name, **{n: n for n in CACHE_DTYPES}})
        _choice("gptq_activation", gptq_activation, {"exact": None, "int8": None})
        _choice("quantization", quantization, {"keep": None, "dequantize": None})
        for name, value in (
            ("max_model_len", 1 if max_model_len is None else max_model_len),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", 1 if max_num_batched_tokens is None else max_num_batched_tokens),
            ("block_size", block_size),
            ("kv_cache_memory", 1 if kv_cache_memory is None else kv_cache_memory),
            ("num_threads", 1 if num_threads is None else num_threads),
            ("tensor_parallel_size", tensor_parallel_size),
        ):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not tensor_parallel_timeout > 0:
            raise ValueError(
                f"tensor_parallel_timeout: expected a positive number of seconds, got {tensor_parallel_timeout}"
            )
        if num_threads is not None:
            torch.set_num_threads(num_threads)

        source = load_source(path)
        self.config: ModelConfig = source.config
        self.tokenizer = source.tokenizer
        head_tensors = _open_head(source, recycle_head)
        if not recycle_verify and head_tensors is None:
            raise ValueError(f"recycle_verify: False needs a recycle head, got recycle_head {recycle_head!r}")
        limit = source.config.max_position
        max_model_len = limit if max_model_len is None else max_model_len
        if max_model_len > limit:
            raise ValueError(f"max_model_len: expected 1 to {limit}, the model's context; got {max_model_len}")
        recycler = None
        if recycle_head is not None:
            recycler = Recycler(head=head_tensors is not None, verify=recycle_verify)
        max_tokens = max_num_batched_tokens or max(512, max_num_seqs)
        options = RankOptions(
            dtype=dtype_name,
            kv_cache_dtype=cache_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            max_decode_tokens=Engine.max_decode_tokens(recycler),
            block_size=block_size,
            kv_cache_memory=_DEFAULT_CACHE_MEMORY if kv_cache_memory is None else kv_cache_memory,
            gptq_activation=gptq_activation,
            quantization=quantization,
        )
        shard = Shard.of(source.config, 0, tensor_parallel_size)
        cache = make_cache(source, options, shard, None if head_tensors is None else head_tensors.config)
        ranks: Ranks | None = None
        self._end_ranks: Callable[[], object] = lambda: None
        if tensor_parallel_size > 1:
            ranks = _meet_ranks(source, options, tensor_parallel_size, num_threads, tensor_parallel_timeout)
            self._end_ranks = ranks.end_with(self)
        self._ranks = ranks
        try:
            model = make_model(source, options, shard, None if ranks is None else ranks.comm)
            module = None
            if head_tensors is not None:
                # This rank alone runs the head, and so needs the embedding and the LM head of all tokens.
                ends = model.ends if ranks is None else read_ends(source, options)
                most = max(max_tokens, max_num_seqs)
                module = RecycleModule(head_tensors, model, ends, max_model_len=max_model_len, max_tokens=most)
            if ranks is not None:
                ranks.meet()
        except BaseException:
            self._end_ranks()
            raise
        self.engine = Engine(
            model,
            cache,
            self.tokenizer,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            recycler=recycler,
            recycle_module=module,
            messages=None if ranks is None else ranks.messages,
        )
        self._ids = count()
        # Outputs that a step made for a caller who was not the one to run it, e.g. of two streams read in turn.
        self._inboxes: dict[str, deque[RequestOutput]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts, batched continuously.

        Parameters
        ----------
        prompts : str, list of int, or a list of these
            Texts or token ids; also as vLLM's ``{"prompt": ...}`` and ``{"prompt_token_ids": ...}``.
        sampling_params : SamplingParams, or one per prompt
        use_tqdm : bool
            Show a progress bar.

        Returns
        -------
        list of RequestOutput
            In the order of the prompts.

        Raises
        ------
        ValueError
            A prompt can never be answered; nothing was computed.
        RequestError
            Some requests failed while they ran; its `outputs` has all of them.
        """
        batch = _prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(batch)
        if not isinstance(sampling_params, Sequence) or not all(isinstance(p, SamplingParams) for p in sampling_params):
            raise TypeError(
                f"sampling_params: expected SamplingParams, or a list of them; got {sampling_params!r:.100}"
            )
        if len(sampling_params) != len(batch):
            raise ValueError(f"sampling_params: expected one per prompt, {len(batch)}; got {len(sampling_params)}")
        return self._run(list(zip(batch, sampling_params, strict=True)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them; see `chat_prompt` and `generate`.

        Variables of the template may be arguments of their own or, as vLLM has it, in `chat_template_kwargs`.
        """
        template_variables |= chat_template_kwargs or {}
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(conversation, **template_variables) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], /, **template_variables: Any) -> list[int]:
        """Token ids of a conversation ``[{"role": ..., "content": ...}, ...]`` in the model's chat template."""
        text = self.tokenizer.apply_chat_template(messages, **template_variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one prompt token by token.

        The request is taken in, and checked, with the first `next`; dropping the iterator aborts it.

        Yields
        ------
        RequestOutput
            The answer so far; `CompletionOutput.new_text` is what came since the one before.
        """
        request_id = self._add(prompt, sampling_params or SamplingParams())
        try:
            finished = False
            while not finished:
                while not self._inboxes[request_id]:
                    self._step()
                output = self._inboxes[request_id].popleft()
                finished = output.finished
                if error := next((answer.error for answer in output.outputs if answer.error), None):
                    raise RequestError(error, [output])
                yield output
        finally:
            self._drop(request_id)

    def score(self, text: Prompt, *, window: int | None = None) -> list[float]:
        """Log-probability of every token of a text but the first, given the tokens before it.

        Parameters
        ----------
        text : str or list of int
        window : int, optional
            Most tokens of context and text at a time; when not given, `max_model_len` or as many as the cache holds. A
            longer text is cut: each window begins with the last token of the one before it, which is context only.
            Every token but the first is thus scored once, those at the start of a window with little context.

        Returns
        -------
        list of float
            Natural logarithms; ``exp(-mean)`` is the perplexity.
        """
        token_ids = list(self._encode(text))
        pool = self.engine.cache.pool
        window = min(self.engine.max_model_len, pool.num_blocks * pool.block_size) if window is None else window
        if not 2 <= window <= self.engine.max_model_len:
            raise ValueError(f"window: expected 2 to {self.engine.max_model_len}, got {window}")
        scores: list[float] = []
        for start in range(0, len(token_ids) - 1, window - 1):
            scores += self.engine.score(token_ids[start : start + window])
        return scores

    def metrics(self) -> dict[str, Any]:
        """Counters and memory, see `Engine.metrics`."""
        return self.engine.metrics()

    def close(self) -> None:
        """End the other ranks, if there are any; also done when the object is gone, and at exit."""
        self._end_ranks()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        request_id = str(next(self._ids))
        plain = unwrapped(prompt)
        text = plain if isinstance(plain, str) else None
        self.engine.add_request(request_id, self._encode(plain), params, text)
        self._inboxes[request_id] = deque()
        return request_id

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        plain = unwrapped(prompt)
        return self.tokenizer.encode(plain) if isinstance(plain, str) else plain

    def _step(self) -> list[str]:
        """Step the engine and deliver what comes of it; returns whose it is."""
        if not self.engine.has_unfinished_requests:
            raise RuntimeError("a request was aborted behind the back of the call that waits for it")
        try:
            outputs = self.engine.step()
        except CommunicatorError:
            self.close()
            raise
        for output in outputs:
            self._inboxes[output.request_id].append(output)
        return [output.request_id for output in outputs]

    def _drop(self, request_id: str) -> None:
        self.engine.abort_request(request_id)
        del self._inboxes[request_id]

    @torch.inference_mode()
    def _run(self, requests: list[tuple[Prompt, SamplingParams]], use_tqdm: bool) -> list[RequestOutput]:
        ids: dict[str, None] = {}  # in order
        done: dict[str, RequestOutput] = {}
        try:
            for number, (prompt, params) in enumerate(requests):
                try:
                    ids[self._add(prompt, params)] = None
                except (ValueError, TypeError) as error:
                    raise type(error)(f"prompts[{number}]: {error}") from None
            with tqdm(total=len(ids), desc="generate", unit="request", disable=not use_tqdm) as progress:
                while len(done) < len(ids):
                    for request_id in ids.keys() & self._step():  # others are of streams that are open
                        if (output := self._inboxes[request_id].pop()).finished:
                            done[request_id] = output
                            progress.update()
        finally:
            for request_id in ids:
                self._drop(request_id)
        outputs = [done[request_id] for request_id in ids]
        if errors := [answer.error for output in outputs for answer in output.outputs if answer.error]:
            raise RequestError("; ".join(sorted(set(errors))), outputs)
        return outputs


def _meet_ranks(source: Source, options: RankOptions, size: int, num_threads: int | None, timeout: float) -> Ranks:
    """The ranks that share the model. Does not return on those that are not the first: they exit when all is done."""
    shared = registered_bytes(source, options)
    found = Ranks.find(size, registered_bytes=shared, timeout=timeout)
    if found is None:
        if num_threads is None:
            num_threads = max(1, torch.get_num_threads() // size)
            torch.set_num_threads(num_threads)
        return Ranks.start(
            source.path, options, size, num_threads=num_threads, registered_bytes=shared, timeout=timeout
        )
    try:
        found.check_alike(source, options)
        if found.comm.rank == 0:
            return found
        serve(source, options, found.comm, found.messages, found.meet)
    except BaseException:
        found.leave()
        raise
    found.end()
    raise SystemExit(0)


def _open_head(source: Source, recycle_head: str | Path | None) -> RecycleHeadTensors | None:
    """The head that is asked for; None where lookup alone, or no recycling, is."""
    if recycle_head == "auto":
        recycle_head = shipped_recycle_head(
            source.tensor("model.norm.weight", (source.config.hidden_size,)), source.config
        )
    if recycle_head is None or recycle_head == "lookup":
        return None
    if not Path(recycle_head).is_dir():
        raise ValueError(f"recycle_head: expected 'lookup', 'auto' or a folder with a head, got {str(recycle_head)!r}")
    return RecycleHeadTensors(recycle_head, source.config)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of them."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise TypeError(f"prompts: expected text, a list of token ids, or a list of these; got {prompts!r:.100}")
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def unwrapped(prompt: Prompt) -> str | Sequence[int]:
    """What is in one of vLLM's dictionaries; anything else as it is."""
    if not isinstance(prompt, Mapping):
        return prompt
    for key in ("prompt_token_ids", "prompt"):
        if key in prompt:
            return prompt[key]
    raise TypeError(f"prompt: expected 'prompt' or 'prompt_token_ids' in it, got {prompt!r:.100}")


def _choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
    return choices[value]
