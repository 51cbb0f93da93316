"""Chat templates: how instructions and conversations become the text that a model sees.

A template is Jinja and is saved with the tokenizer, so transformers and servers build the same ids.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import read_json
from engine.tokenizer import CHAT_TEMPLATE_FILE, CONFIG_FILE, Tokenizer, read_chat_template

# Each has role (system, user or assistant) and content. A message of the user may have an input.
# An answer with weight 0 is not trained on.
Messages = list[dict[str, Any]]
# Our templates differ only in the text around a message of the user.
BEFORE_USER = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}{{ m.content | trim }}{{ eos_token }}{% else %}"
)
AFTER_USER = "{% endif %}{% endfor %}"
PLAIN_TEMPLATE = BEFORE_USER + "{{ m.content }}" + AFTER_USER
DOCSTRING_TEMPLATE = BEFORE_USER + "{{ m.content }}\n" + AFTER_USER
CHAT_TEMPLATE = BEFORE_USER + "### User:\n{{ m.content }}\n\n### Assistant:\n" + AFTER_USER
ALPACA_TEMPLATE = (  # the prompts of Stanford Alpaca's train.py
    BEFORE_USER + "Below is an instruction that describes a task{% if m.input %}, paired with an "
    "input that provides further context{% endif %}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{{ m.content }}\n\n"
    "{% if m.input %}### Input:\n{{ m.input }}\n\n{% endif %}### Response:\n" + AFTER_USER
)
OLD_TEMPLATE_FILE = "prompt_template.json"  # in runs and merged models of earlier versions


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokenizer that encodes its text."""

    template: str
    tokenizer: Tokenizer

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, and with `add_generation_prompt` the start of an
        answer. Raises ValueError if the template refuses the conversation.
        """
        hf_tokenizer = self.tokenizer.hf_tokenizer  # imports transformers, which may be missing
        options = {"chat_template": self.template, "add_generation_prompt": add_generation_prompt}
        try:
            return hf_tokenizer.apply_chat_template(messages, tokenize=False, **options)
        # A template is foreign code and can raise anything. transformers runs it in a sandbox.
        except Exception as error:
            raise ValueError(f"the chat template failed: {error}") from error

    def fit(self, messages: Messages, max_tokens: int) -> Messages:
        """Drop the oldest turns until the conversation has at most `max_tokens` tokens. The system
        message and the last turn stay.
        """
        n_system = int(messages[0]["role"] == "system")
        turns = [i for i, m in enumerate(messages) if m["role"] == "user" and i > n_system]
        for start in (n_system, *turns):
            kept = messages[:n_system] + messages[start:]
            text = self.render(kept, add_generation_prompt=kept[-1]["role"] == "user")
            if len(self.tokenizer.encode(text)) <= max_tokens:
                break
        return kept

    def end_of_answer(self) -> str:
        """Return the text that ends an answer: its special token, if it has one."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?!"}
        end = self.render([question, answer]).partition("?!")[2]
        special = self.tokenizer.special_pattern.search(end)
        return special[0] if special else end.strip()

    def modelfile(self) -> str:
        """Return the text of a Modelfile, with which Ollama imports the model's GGUF file."""
        if BEFORE_USER not in self.template:  # Ollama recognizes many others in the GGUF file
            return "FROM ./model.gguf\n"
        before_user = (
            '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
            '{{ else if eq .Role "assistant" }}{{ .Content }}' + self.end_of_answer() + "{{ else }}"
        )
        text = re.sub(r"\{% if m.input %\}.*?\{% endif %\}", "", self.template, flags=re.DOTALL)
        text = text.replace(BEFORE_USER, before_user).replace(AFTER_USER, "{{ end }}{{ end }}")
        text = text.replace("{{ m.content }}", "{{ .Content }}")
        return f'FROM ./model.gguf\nTEMPLATE """{text}"""\n'


def find_chat_template(path: Path, tokenizer: Tokenizer) -> str | None:
    """Return the chat template in a folder, for example of an adapter, or else the tokenizer's.
    `path` is the folder, a file in it, or a hub name.
    """
    folder = (path if path.is_dir() else path.parent).absolute()
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    old = run / OLD_TEMPLATE_FILE
    if path.exists() and old.is_file():
        values = read_json(old, remedy="delete it")
        user, with_input = values.get("without_input"), values.get("with_input")
        if not isinstance(user, str) or not isinstance(with_input, str | None):
            raise ValueError(f"{old} is damaged, expected text as without_input; delete it")
        if with_input:
            user = "{% if m.input %}" + with_input + "{% else %}" + user + "{% endif %}"
        user = user.replace("{instruction}", "{{ m.content }}").replace("{input}", "{{ m.input }}")
        return BEFORE_USER + user + AFTER_USER
    files = [folder / name for name in (CONFIG_FILE, CHAT_TEMPLATE_FILE) if path.exists()]
    found = read_chat_template({file.name: file.read_bytes() for file in files if file.is_file()})
    return found or tokenizer.chat_template
