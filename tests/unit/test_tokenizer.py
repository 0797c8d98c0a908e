"""Prompts to token ids."""

import pytest
import tokenizers
import transformers

from sampler_service.requests import ChatPrompt, TextPrompt
from sampler_service.tokenizer import Tokenizer
from service_common.errors import Code, ServiceError

TEMPLATE = """{% for message in messages %}{% if message["role"] == "system" %}\
{{ raise_exception("System role not supported") }}{% endif %}{{ message["content"] }} {% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "sea": 1, "wind": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return Tokenizer(folder)


async def test_text_and_chats_become_tokens(tokenizer):
    assert await tokenizer.tokens(TextPrompt("sea wind"), 9) == [1, 2]
    assert await tokenizer.tokens(ChatPrompt([("user", "wind"), ("assistant", "sea")]), 9) == [2, 1]


async def test_a_chat_that_the_models_template_refuses_is_the_callers_mistake(tokenizer):
    with pytest.raises(ServiceError, match="System role not supported") as refusal:
        await tokenizer.tokens(ChatPrompt([("system", "sea"), ("user", "wind")]), 9)
    assert (refusal.value.code, refusal.value.reason) == (Code.INVALID_ARGUMENT, "CHAT_INVALID")


@pytest.mark.parametrize("prompt", [TextPrompt("sea " * 12), ChatPrompt([("user", "sea " * 6)] * 2)])
async def test_a_text_that_cannot_fit_is_refused_before_anybody_waits_for_it(tokenizer, monkeypatch, prompt):
    monkeypatch.setattr(tokenizer, "_thread", None)
    with pytest.raises(ServiceError, match="48 characters, which is more than 9 tokens") as refusal:
        await tokenizer.tokens(prompt, 9)  # of 5 characters, as [UNK] has
    assert refusal.value.reason == "SEQUENCE_TOO_LONG"
