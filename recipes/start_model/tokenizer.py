"""The bundled start's tokenizer: one token a character, 128 ids.

Ids 0 … 5 are the special tokens, then printable ASCII and the line break, then reserved special tokens up to 128, so
that a later role or tool token does not change the shape of the embedding.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 128
PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNKNOWN, END, SYSTEM, USER, ASSISTANT)
CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F)) + "\n"

# <|system|>…<|user|>…<|assistant|>…<|end|>: what the assistant says ends with the end token, so that a conversation of
# several turns shows the model what it has to write itself.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception("the roles of this model are system, user and assistant, not '" ~ message['role'] ~ "'") -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def build_tokenizer(model_max_length: int = 128) -> PreTrainedTokenizerFast:
    """A tokenizer of :data:`VOCABULARY_SIZE` ids whose decoding gives back every text of :data:`CHARACTERS` exactly.

    Args:
        model_max_length: positions that the model has, in tokens.
    """
    reserved = [f"<|reserved_{i}|>" for i in range(VOCABULARY_SIZE - len(SPECIAL) - len(CHARACTERS))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS, *reserved])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, *reserved],
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        chat_template=CHAT_TEMPLATE,
    )
