"""Stand-ins for the engine and the tokenizer: quick, deterministic, and evil on request."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

from sidp_jax.progress import EngineStats
from sidp_jax.request import (
    CompletionOutput,
    Logprob,
    RequestError,
    RequestOutput,
    SamplingParams,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if tail %}{{ tail }}{% endif %}"
)


class FakeTokenizer:
    """A token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_chat(self, messages, template_arguments=None):
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return text, self.encode(text)

    def decode(self, token_ids, *, skip_special_tokens=True) -> str:
        return "".join(map(chr, token_ids))

    def is_text(self, token_id: int) -> bool:
        return True


class FakeEngine:
    """Answers a prompt with its tokens in reverse, sample i starting i tokens later.

    Args:
        max_concurrency: Requests that run at a time.
        max_model_len: Longest prompt, in tokens.
        fail_at_step: Raise in this step, counted from 1.
        step_seconds: Time that a step takes.
        tokenizer: For text, or None.
    """

    def __init__(
        self,
        *,
        max_concurrency: int = 4,
        max_model_len: int = 64,
        fail_at_step: int | None = None,
        step_seconds: float = 0.0,
        tokenizer: FakeTokenizer | None = FakeTokenizer(),  # noqa: B008
    ):
        self.max_concurrency, self.max_model_len = max_concurrency, max_model_len
        self.fail_at_step, self.step_seconds = fail_at_step, step_seconds
        self.tokenizer = tokenizer
        self.kv_tokens, self.compilations, self.mode = 4096, 0, "was"
        self.stats = EngineStats()
        self.most_unfinished = 0
        self.seen: list[str] = []  # ids of all requests
        self._left: dict[str, int] = {}
        self._outputs: dict[str, RequestOutput] = {}

    @property
    def scheduler(self):
        running = min(len(self._left), self.max_concurrency)
        return SimpleNamespace(
            num_running=running,
            num_waiting=len(self._left) - running,
            num_preemptions=0,
            kv_usage=0.5,
            prefix_hit_rate=0.25,
            num_cached_tokens=64,
        )

    @property
    def num_unfinished(self) -> int:
        return len(self._left)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add_request(self, request_id, prompt_token_ids, params, prompt=None) -> None:
        if not 0 < len(prompt_token_ids) < self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens, max_model_len is "
                f"{self.max_model_len}"
            )
        assert request_id not in self._left
        self.seen.append(request_id)
        samples = [self._sample(index, list(prompt_token_ids), params) for index in range(params.n)]
        self._outputs[request_id] = RequestOutput(
            request_id, prompt, list(prompt_token_ids), samples, True
        )
        self._left[request_id] = max(len(sample.token_ids) for sample in samples)
        self.most_unfinished = max(self.most_unfinished, len(self._left))

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def recall(self, most: int) -> list[str]:
        found = list(self._left)[self.max_concurrency :][::-1][:most]
        for request_id in found:
            self.abort(request_id)
        return found

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        self.stats.steps["was"] += 1
        if self.stats.steps["was"] == self.fail_at_step:
            raise RuntimeError("the device is gone")
        running = list(self._left)[: self.max_concurrency]
        finished = []
        for request_id in running:
            self._left[request_id] -= 1
            self.stats.output_tokens += 1
            if self._left[request_id] <= 0:
                del self._left[request_id]
                output = self._outputs.pop(request_id)
                self.stats.prompt_tokens += len(output.prompt_token_ids)
                finished.append(output)
        return finished

    def _sample(self, index: int, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        answer = prompt[::-1]
        answer = answer[index % len(answer) :] + answer[: index % len(answer)]
        token_ids = answer[: params.max_tokens]
        logprobs = None
        if params.logprobs is not None:
            logprobs = [self._logprobs(token, params.logprobs) for token in token_ids]
        return CompletionOutput(
            index=index,
            text="" if self.tokenizer is None else self.tokenizer.decode(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason="length" if len(token_ids) < len(answer) else "stop",
        )

    def _logprobs(self, token: int, wanted: int) -> dict[int, Logprob]:
        """The sampled token is the second most probable one."""

        def entry(token: int, rank: int) -> Logprob:
            text = None if self.tokenizer is None else chr(token)
            return Logprob(-float(rank) if rank < 3 else -float("inf"), rank, text)

        others = {token + rank: entry(token + rank, rank) for rank in range(1, wanted + 1)}
        others.pop(token + 2, None)
        return {token: entry(token, 2)} | others


def write_rows(path: Path, rows: list) -> Path:
    """Writes an input file; bytes and strings are written as they are."""
    with path.open("wb") as stream:
        for row in rows:
            raw = row if isinstance(row, bytes) else (row if isinstance(row, str) else None)
            raw = json.dumps(row).encode() if raw is None else raw
            stream.write((raw.encode() if isinstance(raw, str) else raw) + b"\n")
    return path


def read_results(path: Path) -> list[dict]:
    """All rows of an output file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_model_folder(folder: Path) -> Path:
    """A folder that looks like a small checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def save_byte_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE tokenizer of the Qwen and Llama 3 kind, with a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the quick brown fox"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return folder


def save_ascii_tokenizer(folder: Path) -> Path:
    """A token per printable ASCII character, from id 3 on: 98 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {chr(code): code - 32 + 3 for code in range(32, 127)}
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | characters
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder
