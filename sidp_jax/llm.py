"""The face for scripts and notebooks; names and shapes are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sidp_jax.config import EngineConfig
from sidp_jax.node import open_engine
from sidp_jax.progress import ProgressReport
from sidp_jax.request import RequestError, RequestOutput, SamplingParams
from sidp_jax.startup import check

Prompt = str | Mapping[str, Any] | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model, loaded and ready to generate.

    Args:
        model: Folder of a Hugging Face checkpoint.
        **keys: The keys of ``EngineConfig``, such as ``pool_size=4``, ``mode="was"``.

    Raises:
        ConfigError: A key or value is wrong, or something is missing on this machine.
        CheckpointError: The checkpoint is incomplete or damaged.

    Example:
        >>> llm = LLM(model="Qwen3-32B", pool_size=4, mode="was")
        >>> [output] = llm.generate("1 + 1 =", SamplingParams(temperature=0))
        >>> output.outputs[0].text
    """

    def __init__(self, model: str | Path, **keys: Any):
        self.config = EngineConfig.from_mapping({"model": str(model), **keys})
        check(self.config)
        self.engine = open_engine(self.config)
        self._ids = count()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers; None if it has none."""
        return None if self.engine.tokenizer is None else self.engine.tokenizer.hf

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for all prompts.

        Args:
            prompts: One or several of: a string, ``{"prompt": str}``,
                ``{"prompt_token_ids": [...]}``, a list of token ids.
            sampling_params: For all prompts, or one for each; the config's ``sampling`` by
                default.
            use_tqdm: Whether to report progress (the name is vLLM's).

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            RequestError: A prompt cannot run; then none has.
        """
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._run(encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generates the assistant's next message for one or several conversations.

        Args:
            messages: A list of ``{"role": ..., "content": ...}``, or a list of such lists.
            sampling_params: As in ``generate``.
            use_tqdm: As in ``generate``.
            chat_template_kwargs: Variables for the chat template.

        Raises:
            RequestError: A conversation cannot run; then none has.
        """
        messages = list(messages)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self._need_tokenizer()
        encoded = [tokenizer.encode_chat(turns, chat_template_kwargs) for turns in conversations]
        return self._run(encoded, sampling_params, use_tqdm)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise RequestError(
                    f"a prompt needs one of the keys 'prompt' and 'prompt_token_ids', got "
                    f"{sorted(prompt)}"
                )
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer().encode(prompt)
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise RequestError(f"prompt {prompt!r:.100} must be a string or a list of token ids")
        return None, list(prompt)

    def _need_tokenizer(self) -> Any:
        if self.engine.tokenizer is None:
            raise RequestError("text needs a tokenizer, and the model has none; pass token ids")
        return self.engine.tokenizer

    def _run(
        self,
        encoded: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        report: bool,
    ) -> list[RequestOutput]:
        params = self._params_for_each(sampling_params, len(encoded))
        for (_, token_ids), choice in zip(encoded, params, strict=True):
            self.engine.check_request(token_ids, choice)
        ids = [str(next(self._ids)) for _ in encoded]
        outputs: dict[str, RequestOutput] = {}
        try:
            for request_id, (prompt, token_ids), choice in zip(ids, encoded, params, strict=True):
                self.engine.add_request(request_id, token_ids, choice, prompt)
            with ProgressReport(self.engine, len(ids), enabled=report) as progress:
                while len(outputs) < len(ids):
                    outputs |= {output.request_id: output for output in self.engine.step()}
                    progress.update(len(outputs))
        finally:  # nothing stays behind in the engine, whatever was raised
            for request_id in ids:
                if request_id not in outputs:
                    self.engine.abort(request_id)
        return [outputs[request_id] for request_id in ids]

    def _params_for_each(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, size: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.config.sampling
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * size
        if len(sampling_params) != size:
            raise RequestError(
                f"{len(sampling_params)} sampling_params for {size} prompts: pass one, or as many"
            )
        return list(sampling_params)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a single prompt, also one of token ids, becomes a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts
