"""Which experts tokens visit, from even to extreme."""

import torch


ROUTINGS = ("uniform", "zipf", "one hot", "quarter empty")


def route(name: str, tokens: int, slots: int, experts: int, *, seed: int = 0) -> torch.Tensor:
    """`(tokens, slots)`, distinct experts for each token. `"zipf"`: expert i with weight 1 / (i + 1); `"one hot"`: the
    first slot of every token is expert 0; `"quarter empty"`: uniform over three quarters of the experts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(experts)
    if name == "zipf":
        weight = 1 / torch.arange(1, experts + 1)
    elif name == "quarter empty":
        weight[max(slots, experts - experts // 4) :] = 0
    elif name == "one hot":
        weight[0] = 1e9
    elif name != "uniform":
        raise ValueError(f"Unknown routing {name!r}; known: {', '.join(ROUTINGS)}.")
    # The largest of weight / exponential: draws without replacement, in proportion to the weights.
    noise = torch.empty(tokens, experts).exponential_(generator=generator)
    return (weight / noise).topk(slots, dim=1).indices
