"""Text to tokens and back, and the end of a text at a stop string (no jax)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sidp_jax.request import RequestError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Prompt tokens that give the first output token its context: some tokenizers drop a space at
# the beginning of what they decode.
_CONTEXT = 6
# Tokens looked at beyond those that a stop string can span: the first may be part of a character.
_MARGIN = 4


class TokenizerError(ValueError):
    """A tokenizer that cannot be read."""


class Tokenizer:
    """A Hugging Face tokenizer, reduced to what the engine needs.

    Text goes straight to the Rust tokenizer beneath transformers' own, which takes a fifth of the
    time; chat templates are transformers'.

    Args:
        hf: A tokenizer of transformers.
    """

    def __init__(self, hf: Any):
        self.hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` can work."""
        return self.hf.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with the special tokens that the tokenizer adds.

        Raises:
            RequestError: The text is no valid Unicode.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_arguments: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation as prompt text and its tokens, up to where the assistant has to answer.

        Args:
            messages: Mappings with ``role`` and ``content``.
            template_arguments: More variables for the chat template.

        Raises:
            RequestError: There is no chat template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise RequestError("the tokenizer has no chat template; send a prompt instead")
        try:
            text = self.hf.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                **(template_arguments or {}),
            )
        except Exception as error:  # templates are programs, and raise whatever they like
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        return text, self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens, as it is: no spaces are tidied up, unknown ids are left out."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_text(self, token_id: int) -> bool:
        """Whether a token shows up in decoded text: it is known, and no special token."""
        return token_id not in self._special and self._backend.id_to_token(token_id) is not None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):  # a lone surrogate
            raise RequestError("the text is no valid Unicode: it has lone surrogates") from None


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, None if it has none; no code is run from there.

    Raises:
        TokenizerError: There is a tokenizer, but it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about torch, not used here
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever its parsers raise
        raise TokenizerError(f"cannot read the tokenizer in {folder}: {error}") from error
    if not hf.is_fast:
        raise TokenizerError(f"the tokenizer in {folder} has no fast form: add its tokenizer.json")
    return Tokenizer(hf)


@runtime_checkable
class Decodes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def is_text(self, token_id: int) -> bool:
        """Whether a token shows up in decoded text."""
        ...


class Detokenizer:
    """The text of one output, which grows token by token until a stop string ends it.

    Without stop strings nothing is decoded until the text is read. With them, every token
    decodes a short window: a stop string of ``n`` bytes spans at most ``n`` tokens. The text is
    then cut before the stop string that is complete first, as in vLLM, those listed first
    winning a tie.

    Args:
        tokenizer: Decodes, or None: the text stays empty.
        prompt_ids: The prompt.
        stop: Strings that end the text.

    Raises:
        RequestError: There are stop strings, but no tokenizer.
    """

    def __init__(self, tokenizer: Decodes | None, prompt_ids: Sequence[int], stop: Sequence[str]):
        if stop and tokenizer is None:
            raise RequestError(f"{stop=} needs a tokenizer, and the model has none")
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-_CONTEXT:])
        self._stop = tuple(stop)
        window = max((len(s.encode()) for s in stop), default=0) + _MARGIN
        self._recent: deque[int] = deque(maxlen=window)
        self._token_ids: list[int] = []
        self._cut: int | None = None  # where the text ends, if the last token completed a stop

    def append(self, token_id: int) -> str | None:
        """Takes the next token.

        A token that ends the output by its id (an end token or a stop token) is not part of the
        text and is not appended. Going on after a stop string makes it ordinary text.

        Returns:
            The stop string that this token has completed, or None.
        """
        self._token_ids.append(token_id)
        self._cut = None
        if not self._stop or not self._tokenizer.is_text(token_id):
            return None
        self._recent.append(token_id)
        recent = self._tokenizer.decode(list(self._recent))
        if not any(stop in recent for stop in self._stop):
            return None
        # A hit is rare: only now look at the whole text, and only at matches that are new.
        text = self._text()
        known = len(self._text(-1).rstrip("\ufffd"))
        found = []
        for order, stop in enumerate(self._stop):
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), order, start, stop))
        if not found:
            return None
        _, _, self._cut, stop = min(found)
        return stop

    @property
    def text(self) -> str:
        """The text up to here; a character that is not complete reads U+FFFD."""
        return "" if self._tokenizer is None else self._text()[: self._cut]

    def _text(self, end: int | None = None) -> str:
        token_ids = self._token_ids[:end]
        context = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode([*self._context, *token_ids])
        if text.startswith(context):
            return text[len(context) :]
        return self._tokenizer.decode(token_ids)  # the prompt ends within a character
