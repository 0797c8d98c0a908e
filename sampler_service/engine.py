"""vLLM: start, generate, score, install and drop adapters, stop.

With `openai_http.py` the only module of the service's own process that imports vLLM. It validates nothing; `sampler.py`
has done that.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import PrometheusStatLogger

from sampler_service.config import SamplerConfig
from sampler_service.requests import Delta, Finish, Position, Sampling, Structure, structure_invalid
from sampler_service.versions import Version
from service_common import errors
from service_common.checkpoint import Checkpoint
from service_common.lora import TARGET_MODULES
from tinkerbell import payload, tensors
from tinkerbell.v1 import common_pb2

log = structlog.get_logger(__name__)

# Ranks for which vLLM reserves memory; others round up.
_SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_CPU_KV_CACHE_BYTES = 1 << 30

# vLLM reports a completion that ended at a stop string before it tells its core to stop generating it. An adapter
# that is dropped in between takes the core down, so that much time passes between the last report and the drop.
_DROP_GRACE_SECONDS = 1.0

# How long vLLM's core may take to end its workers, which have 5 s of their own, before all of them are killed.
_SHUTDOWN_SECONDS = 15.0

_FINISH = {None: None, "stop": Finish.STOP, "length": Finish.LENGTH}


@dataclass(frozen=True)
class EngineInfo:
    """What the running engine is.

    device: "cpu" or "cuda".
    dtype: of the base weights.
    max_model_len: longest sequence in tokens.
    """

    device: str
    dtype: common_pb2.DataType
    max_model_len: int


class Engine:
    """A running vLLM with one base model.

    llm: vLLM itself, for `openai_http.py`.

    Every method raises ServiceError UNAVAILABLE (ENGINE_DEAD) once vLLM's processes have died.
    """

    def __init__(self, config: SamplerConfig, checkpoint: Checkpoint, has_tokenizer: bool):
        """Starts vLLM's processes and returns when they are ready, after a minute or so. Not on the event loop."""
        on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {}
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes or _CPU_KV_CACHE_BYTES
            arguments["max_num_batched_tokens"] = 512  # longer prompts take several steps, and others decode between
            if config.tensor_parallel == 1:
                # One process less: half a minute of imports, and a hop in every step. By class, since vLLM makes a
                # process of its own of "uni" on a CPU, in order to choose its number of threads; `environment` has done
                # that.
                arguments["distributed_executor_backend"] = UniProcExecutor
        elif config.dtype == "float32":
            raise errors.invalid_argument(
                "DATA_TYPE_UNSUPPORTED",
                "vLLM's LoRA kernels take 16-bit weights on a GPU; choose bfloat16",
                dtype="float32",
            )
        else:
            # Never more than the service admits: vLLM captures CUDA graphs and keeps memory for as many.
            arguments["max_num_seqs"] = min(config.max_sequences, 1024)
            if config.gpu_memory_utilization is not None:
                arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
            if config.kv_cache_bytes is not None:
                arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(checkpoint.folder),
                dtype=config.dtype,
                tensor_parallel_size=config.tensor_parallel,
                # As the trainer's are: logits that each of them rounds for itself set the two apart.
                hf_overrides={"head_dtype": "float32"},
                max_model_len=config.max_model_len,
                skip_tokenizer_init=not has_tokenizer,
                enable_prefix_caching=True,
                generation_config="vllm",  # what a request leaves open is the same for every model
                enable_lora=True,
                max_loras=config.max_loras,
                max_lora_rank=min(rank for rank in _SLOT_RANKS if rank >= config.max_rank),
                # Left alone vLLM adapts embeddings and lm_head as well: large slots, and scoring crashes on a CPU.
                lora_target_modules=list(TARGET_MODULES),
                # Left alone vLLM tries others where this one refuses, and the first that it takes gets all requests.
                structured_outputs_config=StructuredOutputsConfig(backend="xgrammar"),
                worker_extension_cls="sampler_service.worker_extension.LoraWorkerExtension",
                disable_log_stats=True,
                **arguments,
            ),
            stat_loggers=[PrometheusStatLogger],
            # Those who embed vLLM get small steps on a GPU: 2,048 tokens at most, and a server 8,192.
            usage_context=UsageContext.OPENAI_API_SERVER,
        )
        self._request_ids = itertools.count()
        self._drops: set[asyncio.Task[None]] = set()
        model = self.llm.model_config
        self.info = EngineInfo(
            device="cpu" if on_cpu else "cuda",
            dtype=tensors.dtype_from_name(str(model.dtype).removeprefix("torch.")),
            max_model_len=model.max_model_len,
        )

    @property
    def dead(self) -> bool:
        """True once vLLM's processes have died; nothing brings them back."""
        return self.llm.errored

    async def prove(self) -> None:
        """Runs one step. vLLM can load models that it cannot run, and dies of the first request for them."""
        async for _ in self.generate((0,), Sampling(max_tokens=1), None):
            pass

    def check_structure(self, structure: Structure) -> None:
        """INVALID_ARGUMENT when vLLM cannot follow it."""
        config = self.llm.vllm_config
        try:
            SamplingParams(structured_outputs=_structured_outputs(structure)).verify(
                config.model_config,
                config.speculative_config,
                config.structured_outputs_config,
                self.llm.tokenizer,
            )
        except ValueError as cause:
            raise structure_invalid(structure, str(cause)) from cause

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, version: Version | None, *, whole: bool = False
    ) -> AsyncGenerator[Delta]:
        """Streams the completions' new tokens, those of all completions interleaved. Closing the iterator aborts.

        `whole`: one delta per completion, all of them when the last has ended, so that most of vLLM's steps cost this
        process nothing but detokenisation.
        """
        temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
        if temperature == 0 and sampling.n > 1:
            # vLLM refuses equal completions. The likeliest token alone, at any temperature, is the greedy one.
            temperature, top_p, top_k = 1.0, 1.0, 1
        # vLLM's model runner adds it to the prompt's length as 32 bits.
        room = self.info.max_model_len - len(prompt)
        parameters = SamplingParams(
            n=sampling.n,
            max_tokens=None if sampling.max_tokens is None else min(sampling.max_tokens, room),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            # vLLM takes -1 for none and adds the completion's index, which must not overflow.
            seed=None if sampling.seed is None else sampling.seed % (1 << 62),
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            structured_outputs=_structured_outputs(sampling.structure),
            detokenize=self.llm.tokenizer is not None,
            output_kind=RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
        )
        scored_prompt = sampling.prompt_logprobs is None
        async with self._request(prompt, parameters, version) as outputs:
            async for output in outputs:
                # Every completion comes with them once, and they are all the same.
                prompt_logprobs = []
                if not scored_prompt and output.prompt_logprobs:
                    prompt_logprobs = _positions(prompt[1:], output.prompt_logprobs[1:], sampling.prompt_logprobs)
                    scored_prompt = True
                for completion in output.outputs:
                    yield Delta(
                        index=completion.index,
                        tokens=list(completion.token_ids),
                        text=completion.text,
                        logprobs=_positions(completion.token_ids, completion.logprobs, sampling.logprobs),
                        finish=_finish(completion.finish_reason),
                        prompt_logprobs=prompt_logprobs,
                    )
                    prompt_logprobs = []

    async def score(self, tokens: Sequence[int], version: Version | None) -> np.ndarray:
        """float32 [len(tokens) - 1]: log p(tokens[i + 1] | tokens[0..i]) at temperature 1. Cancelling it aborts."""
        parameters = SamplingParams(
            max_tokens=1,  # the least that vLLM generates
            temperature=0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._request(tokens, parameters, version) as outputs:
            async for output in outputs:
                prompt_logprobs = output.prompt_logprobs
        return np.array(
            [entry[token].logprob for token, entry in zip(tokens[1:], prompt_logprobs[1:], strict=True)], np.float32
        )

    async def install(self, version: Version, memory_id: str) -> None:
        """Brings a version into every worker and into a slot of its layers; or leaves nothing anywhere.

        `memory_id`: of the GPU memory that has the payload, which is copied to the version's buffer as well; if it is
        empty the buffer has the payload, and its digest was checked.

        INVALID_ARGUMENT when a number is not finite, DATA_LOSS when GPU memory does not have what was announced.
        """
        try:
            answers = await self._on_all_ranks(
                "tinkerbell_install",
                version.lora_name,
                version.lora_id,
                version.uri,
                version.payload.path,
                version.payload.size_bytes,
                version.layout,
                memory_id,
            )
            for not_finite, payload_hash in answers:
                if memory_id and payload.digest_of(version.manifest, payload_hash) != version.digest:
                    raise errors.data_loss(
                        "PAYLOAD_DAMAGED",
                        "what the GPU memory has is not what was announced; nothing was installed, push again",
                        adapter_id=version.adapter_id,
                        version=version.version,
                    )
                if not_finite:
                    raise errors.invalid_argument(
                        "TENSOR_NOT_FINITE",
                        f"tensor {not_finite!r}, scaled and rounded to this sampler's dtype, has an infinity or a NaN",
                        tensor=not_finite,
                    )
            if memory_id and len(answers) > 1:
                await self.settle(version)  # the first rank fills the buffer, and others may load from it
        except BaseException:
            await self._on_all_ranks("tinkerbell_drop", version.uri, version.lora_id)
            raise

    async def open_device_memory(self, memory_id: str, handle: bytes, size_bytes: int) -> None:
        """Opens another process's GPU memory on every rank, or on none: FAILED_PRECONDITION if one cannot reach it."""
        obstacles = await self._on_all_ranks("tinkerbell_open_memory", memory_id, handle, size_bytes)
        if obstacle := next(filter(None, obstacles), ""):
            await self.close_device_memory(memory_id)
            raise errors.failed_precondition(
                "CUDA_IPC_UNREACHABLE", f"the sampler's GPU cannot read the memory: {obstacle}"
            )

    async def close_device_memory(self, memory_id: str) -> None:
        """Ends that, after what is under way."""
        with contextlib.suppress(errors.ServiceError):  # where vLLM has died nothing is open
            await self._on_all_ranks("tinkerbell_close_memory", memory_id)

    async def settle(self, version: Version) -> None:
        """Waits until the version's buffer has all of its payload, which comes later if it came from GPU memory."""
        await self._on_all_ranks("tinkerbell_settle", version.uri)

    async def abort(self, request: LoRARequest) -> None:
        """Ends what runs for this very object."""
        states = self.llm.output_processor.request_states.items()
        await self.llm.abort([key for key, state in states if state.lora_request is request], internal=True)

    def drop(self, version: Version) -> None:
        """Frees a version's memory, here and in every worker, soon. Its last request must have ended."""
        task = asyncio.create_task(self._drop(version))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def reloads(self) -> int:
        """How often vLLM has loaded a version again that it had evicted; of the rank where that was most often."""
        return max(await self._on_all_ranks("tinkerbell_reloads"))

    def shutdown(self) -> None:
        """Ends vLLM's processes. Takes seconds and blocks."""
        self.llm.shutdown(timeout=_SHUTDOWN_SECONDS)

    async def _drop(self, version: Version) -> None:
        await asyncio.sleep(_DROP_GRACE_SECONDS)
        with contextlib.suppress(errors.ServiceError):  # where vLLM has died nothing is left of it
            await self._on_all_ranks("tinkerbell_drop", version.uri, version.lora_id)
        version.payload.close()
        log.info("version_dropped", adapter_id=version.adapter_id, version=version.version)

    async def _on_all_ranks(self, method: str, *arguments: Any) -> list[Any]:
        with _dead_engine_reported():
            return await self.llm.collective_rpc(method, args=arguments)

    @contextlib.asynccontextmanager
    async def _request(
        self, prompt: Sequence[int], parameters: SamplingParams, version: Version | None
    ) -> AsyncIterator[AsyncIterator[Any]]:
        outputs = self.llm.generate(
            tokens_input(list(prompt)),
            parameters,
            request_id=str(next(self._request_ids)),
            lora_request=lora_request(version) if version else None,
        )
        with _dead_engine_reported():
            async with contextlib.aclosing(outputs):
                yield outputs


def kill_starting_engine() -> None:
    """Ends vLLM's processes while an `Engine` is being made, whose constructor then raises.

    Kills, since they do not react to SIGTERM before they are ready, and have nothing to lose yet.
    """
    for child in multiprocessing.active_children():
        kill_process_tree(child.pid)


def lora_request(version: Version) -> LoRARequest:
    """The version as vLLM's methods take it."""
    return LoRARequest(version.lora_name, version.lora_id, version.uri)


def _finish(reason: str | None) -> Finish | None:
    if reason not in _FINISH:
        raise errors.unavailable(
            "COMPLETION_ABORTED", f"vLLM gave the completion up ({reason}); send it again", finish_reason=reason
        )
    return _FINISH[reason]


def _positions(tokens: Sequence[int], logprobs: Any, count: int | None) -> list[Position]:
    if count is None:
        return []
    positions = []
    for token, entries in zip(tokens, logprobs, strict=True):
        top = sorted(((entry.logprob, other) for other, entry in entries.items()), reverse=True)[:count]
        positions.append(Position(entries[token].logprob, [(other, logprob) for logprob, other in top]))
    return positions


def _structured_outputs(structure: Structure | None) -> StructuredOutputsParams | None:
    match structure:
        case None:
            return None
        case Structure("json_schema", value):
            return StructuredOutputsParams(json=value)
        case Structure("choice", value):
            return StructuredOutputsParams(choice=list(value))
        case Structure(kind, value):
            return StructuredOutputsParams(**{kind: value})


@contextlib.contextmanager
def _dead_engine_reported():
    try:
        yield
    except EngineDeadError as cause:
        raise errors.unavailable(
            "ENGINE_DEAD", "vLLM has died; the sampler is about to end, try another one"
        ) from cause
