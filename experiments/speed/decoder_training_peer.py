"""transformers on PyTorch, which `decoder_training.py` is compared with. Runs in the peers' environment.

python experiments/speed/decoder_training_peer.py SETTINGS

SETTINGS is a JSON object. For each line that comes in, it trains and says the seconds of a step.
"""

import json
import sys
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class LowRank(nn.Module):
    """x W + (x A) B, W frozen."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.down.T) @ self.up.T


def main() -> None:
    """Trains a step for every line of stdin."""
    s = json.loads(sys.argv[1])
    torch.set_num_threads(s["threads"])
    config = LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["width"],
        intermediate_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if s["kind"] == "lora":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, LowRank(child, s["rank"]))
    if s["kind"] == "rematerialised":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, s["vocabulary"], (s["tokens"] // s["time"], s["time"]))
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        for _ in range(s["steps"]):
            optimiser.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimiser.step()
        print((time.perf_counter() - begun) / s["steps"], flush=True)


if __name__ == "__main__":
    main()
