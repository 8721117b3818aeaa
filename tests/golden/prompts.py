"""64 varied prompts of 1 to 2,000 tokens for the bundled model."""

from pathlib import Path

from engine.tokenizer import Tokenizer

SHORT = [
    "The capital of France is",
    "The capital of Japan is Tokyo. The capital of Italy is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "import numpy as np\n\ndef softmax(x):",
    "1, 2, 3, 4, 5,",
    "12 + 30 = 42\n17 + 25 =",
    "In 1969, Neil Armstrong",
    "Water boils at 100 degrees",
    "Q: What is photosynthesis?\nA:",
    "SELECT name, age FROM users WHERE",
    '{"name": "Alice", "age":',
    "<html>\n<head>\n<title>",
    "Le chat est assis sur",
    "Der schnelle braune Fuchs",
    "El perro corre por",
    "Il était une fois une petite fille",
    "東京は日本の",
    "Привет, как дела?",
    "I ❤️ pizza 🍕 and",
    "A list of fruits:\n- apple\n- banana\n-",
    "To be, or not to be,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "Roses are red,\nViolets are blue,\n",
]
TINY = ["A", "The", " ", "\n", "7", "Hello", "Hello,", "I am"]
CHAT = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "Give me three names for a cat.",
    "Translate 'good morning' to Spanish.",
    "What is 7 times 8?",
    "Who wrote Romeo and Juliet?",
    "List the primary colours.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
]
LICENSE_SLICES = [  # (first token, tokens): some share a prefix, some overlap
    *((0, length) for length in (40, 100, 101, 250, 257, 400)),
    *((start, 128) for start in (50, 300, 500, 700)),
    *((start, 300) for start in (100, 400, 900)),
    (64, 512),
    (200, 512),
    (333, 777),
    (0, 600),
    (10, 600),
    (0, 1000),
    (500, 1000),
    (0, 1500),
    (0, 2000),
]


def golden_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt."""
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tokenizer.encode(license_text)
    return [
        *map(tokenizer.encode, SHORT + TINY),
        *(tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHAT),
        *(ids[start : start + length] for start, length in LICENSE_SLICES),
    ]
