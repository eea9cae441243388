"""transformers on PyTorch, which `decoding.py` is compared with. Runs in the peers' environment, prints a line of JSON.

python experiments/speed/decoding_peer.py FOLDER BATCH PROMPT TOKENS ROUNDS
"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Seconds of a prefill and of decoding, greedy, with a cache: medians of rounds, by threads; and the tokens."""
    folder, (batch, prompt, tokens, rounds) = sys.argv[1], map(int, sys.argv[2:6])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.arange(batch * prompt).reshape(batch, prompt) * 7919 % 40_000
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _ in range(rounds + 1):
            with torch.inference_mode():
                begun = time.perf_counter()
                out = model(ids, use_cache=True, logits_to_keep=1)
                new = out.logits[:, -1:].argmax(-1)
                filled = time.perf_counter()
                said = [new]
                for _ in range(tokens):
                    out = model(new, past_key_values=out.past_key_values, use_cache=True)
                    new = out.logits[:, -1:].argmax(-1)
                    said.append(new)
                seconds["prefill"].append(filled - begun)
                seconds["decode"].append(time.perf_counter() - filled)
        found[str(threads)] = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(json.dumps({"seconds": found, "tokens": torch.cat(said, 1).tolist()}))


if __name__ == "__main__":
    main()
