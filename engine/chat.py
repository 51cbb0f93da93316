"""Chat templates: how instructions and conversations become the text that a model sees.

A template is Jinja and is saved with the tokenizer, so transformers and servers build the same ids.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
        options = {"chat_template": self.template, "add_generation_prompt": add_generation_prompt}
        try:
            return self.tokenizer.hf_tokenizer.apply_chat_template(
                messages, tokenize=False, **options
            )
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

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray, str, int]:
        """Encode a conversation that ends with an answer.

        Return the ids (T), as from `apply_chat_template`; a mask (T) of the answers and the text
        that ends them; the text before the last answer; and how many tokens that text has. Raises
        ValueError if later turns change how the template renders earlier ones.
        """
        text = self.render(messages)
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets])  # of each token in the text
        is_target = np.zeros(len(ends), dtype=bool)
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            prompt = self.render(messages[:i], add_generation_prompt=True) if i else ""
            through = self.render(messages[: i + 1])
            if not (through.startswith(prompt) and text.startswith(through)):
                raise ValueError(
                    "the chat template is not prefix-preserving: later turns change how earlier "
                    "ones are rendered, so answers cannot be found; edit the template"
                )
            if messages[i].get("weight") != 0:
                is_target |= (ends > len(prompt)) & (ends <= len(through))
        return np.array(encoding.ids), is_target, prompt, int((ends <= len(prompt)).sum())

    def end_of_answer(self) -> str:
        """Return the text that ends an answer: its special token, if it has one."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?!"}
        end = self.render([question, answer]).partition("?!")[2]
        special = self.tokenizer.special_pattern.search(end)
        return special[0] if special else end.strip()

    def modelfile(self) -> str:
        """Return the text of a Modelfile, with which Ollama imports the model's GGUF file."""
        text = "FROM ./model.gguf\n"
        start, is_ours, user = self.template.partition(BEFORE_USER)
        if is_ours:  # Ollama recognizes many other templates in the GGUF file
            user = re.sub(r"\{% if m.input %\}.*?\{% endif %\}", "", user, flags=re.DOTALL)
            user = user.removesuffix(AFTER_USER).replace("{{ m.content }}", "{{ .Content }}")
            text += (
                f'TEMPLATE """{start}'
                '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
                f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.end_of_answer()}'
                f'{{{{ else }}}}{user}{{{{ end }}}}{{{{ end }}}}"""\n'
            )
        return text


def prepend_bos(template: str, tokenizer: Tokenizer) -> str:
    """Return the template with the token that the tokenizer puts before a text, if any."""
    return tokenizer.decode(tokenizer.encode("", add_special_tokens=True)) + template


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
