"""The bundled start's tokenizer: one token a character.

Ids 0 … 4 are the special tokens, then the line break and printable ASCII. The model's embedding has :data:`VOCABULARY`
rows, more than there are tokens, so that a further special token does not change its shape.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 128  # rows of the embedding
MAX_LENGTH = 256  # positions of the model
PAD, END, USER, ASSISTANT, SYSTEM = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = (PAD, END, USER, ASSISTANT, SYSTEM)
CHARACTERS = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))

# <|system|>…<|user|>…<|assistant|>…<|end|>: what the assistant says ends with the end token, in earlier turns too.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}<|assistant|>{{ message['content'] }}<|end|>"
    "{%- elif message['role'] == 'system' -%}<|system|>{{ message['content'] }}"
    "{%- else -%}<|user|>{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose decoding gives back every text of :data:`CHARACTERS` exactly; any other character becomes
    ``<|pad|>``."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
