"""Text and chats to token ids, as the base model's own tokenizer does it."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import transformers

from sampler_service.requests import ChatPrompt, Prompt, TextPrompt, TokenPrompt, check_messages
from service_common import errors

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """The tokenizer of a checkpoint folder; without one (`present` is False) only token ids will do.

    It works in a thread of its own, since long texts take long; one thread, since tokenizers are not thread-safe.
    """

    def __init__(self, folder: Path):
        """Loads it, if it is there."""
        self.present = any((folder / name).is_file() for name in _FILES)
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder) if self.present else None
        vocabulary = self._tokenizer.get_vocab() if self._tokenizer else {}
        self._longest = max(map(len, vocabulary), default=0)  # characters of a token
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def require(self, what: str) -> None:
        """FAILED_PRECONDITION if there is no tokenizer; `what` needs one, for the message."""
        if not self.present:
            raise errors.failed_precondition(
                "NO_TOKENIZER", f"the base model comes without a tokenizer, which {what} needs; send token ids"
            )

    async def tokens(self, prompt: Prompt, most: int) -> Sequence[int]:
        """The prompt's token ids. FAILED_PRECONDITION without a tokenizer or chat template, where one is needed.

        INVALID_ARGUMENT for a text of more characters than `most` tokens can have: the others would wait for it.
        """
        match prompt:
            case TokenPrompt(tokens):
                return tokens
            case TextPrompt(text):
                self.require("a text prompt")
                self._check_size(len(text), most)
                return await self._in_thread(self._encode, text)
            case ChatPrompt(messages):
                self.require("a chat")
                check_messages(messages)
                self._check_size(sum(len(content) for _, content in messages), most)
                return await self._in_thread(self._render, messages)

    def _check_size(self, characters: int, most: int) -> None:
        if characters > most * self._longest:
            raise errors.invalid_argument(
                "SEQUENCE_TOO_LONG",
                f"the prompt has {characters} characters, which is more than {most} tokens, and no longer one fits",
                field="prompt",
                characters=characters,
                max_tokens=most,
            )

    async def _in_thread(self, function, argument) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, argument)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _render(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise errors.failed_precondition(
                "NO_CHAT_TEMPLATE", "the base model's tokenizer has no chat template; send text or token ids"
            )
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                return_dict=False,
            )
        except jinja2.TemplateError as refusal:  # templates want roles to alternate, for example
            raise errors.invalid_argument(
                "CHAT_INVALID", f"the base model's chat template refuses the chat: {refusal}", field="chat.messages"
            ) from refusal
