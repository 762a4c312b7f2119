from __future__ import annotations


def load_tokenizer(path):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(path)


class PromptEncoder:
    def __init__(self, tokenizer, chat_template_path=None, system_prompt=None, max_prompt_tokens=16, long_prompts="error"):
        self.t = tokenizer

    def encode(self, row):
        return self.t.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
