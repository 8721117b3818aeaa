"""What the directory of a model says of its tokenizer. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from engine.config_keys import read_json_object
from engine.errors import ConfigError

SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")
"""Files of tokenizers that transformers can convert."""

_CONVERT = (
    "import sys; from transformers import AutoTokenizer; "
    "sys.stdout.write(AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer.to_str())"
)


def load_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer without its ends.

    Raises:
        ConfigError: there is none, or one of a kind that is not supported.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return tokenizers.Tokenizer.from_str(_convert_slow(folder))
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{path} is not a usable tokenizer: {error}.") from error


def _convert_slow(folder: Path) -> str:
    """tokenizer.json's text for a tokenizer in older files.

    transformers converts it, in a process of its own because it imports torch.
    """
    if not any((folder / name).is_file() for name in SLOW_FILES):
        raise ConfigError(
            f"{folder} has no tokenizer: none of tokenizer.json, {', '.join(SLOW_FILES)}."
        )
    command = [sys.executable, "-c", _CONVERT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(
            f"transformers cannot convert the tokenizer in {folder}: {''.join(reason)}"
        )
    return done.stdout


def read_special_tokens(options: Mapping[str, Any]) -> dict[str, str]:
    """Name → text; tokenizer_config.json gives texts, or objects that hold them."""
    texts = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
        value = options.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def add_ends(
    backend: tokenizers.Tokenizer, options: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Let `add_bos_token` and `add_eos_token`, where given, overrule tokenizer.json.

    transformers 5 does so for every tokenizer.
    """
    if "add_bos_token" not in options and "add_eos_token" not in options:
        return
    wanted = [end for end in ("bos", "eos") if options.get(f"add_{end}_token")]
    texts = {end: special[f"{end}_token"] for end in wanted if f"{end}_token" in special}
    parts = [*([texts["bos"]] if "bos" in texts else []), "$A"]
    parts += [texts["eos"]] if "eos" in texts else []
    pairs = [(text, backend.token_to_id(text)) for text in texts.values()]
    backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=pairs)


def read_chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    """The template, from the newest of the three places that hold it; None if none does.

    Raises:
        ConfigError: it is not text.
    """
    jinja_file, json_file = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    holder = read_json_object(json_file) if json_file.is_file() else options
    template = holder.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{folder}: chat_template must be text, got {json.dumps(template)}.")
    return template
