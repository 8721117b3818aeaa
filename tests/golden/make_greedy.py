"""Write greedy.json: what transformers' `generate` says to the golden prompts in float32.

usage: python -m tests.golden.make_greedy

Each continuation comes with the gap between the two likeliest logits at each of its tokens, so that
a test on another machine can tell a tie from an error.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from tests.golden.prompts import golden_prompts

NEW_TOKENS = 64
FILE = Path(__file__).with_name("greedy.json")


def main() -> None:
    source = resolve_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    ).eval()
    rows = [
        {"prompt": prompt, **generate(model, prompt)}
        for prompt in golden_prompts(Tokenizer.load(source))
    ]
    made_by = {"transformers": transformers.__version__, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made_by": made_by, "rows": rows}, separators=(",", ":")))
    print(len(rows), "prompts; smallest gap", min(gap for row in rows for gap in row["gaps"]))


@torch.inference_mode()
def generate(model, prompt: list[int]) -> dict:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.stack([logits[0].topk(2).values for logits in output.logits])
    gaps = (top[:, 0] - top[:, 1]).tolist()
    tokens = output.sequences[0, len(prompt) :].tolist()
    return {"tokens": tokens, "gaps": [round(gap, 5) for gap in gaps]}


if __name__ == "__main__":
    main()
