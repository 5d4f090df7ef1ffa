"""A small CTR model with every kind of feature for the tests of this folder."""

import torch

from hf_models.ctr import CtrConfig, CtrForCtrPrediction


ARCHITECTURES = ("lr", "wide_deep", "pnn", "deepfm", "din")
SIZES = {"user_id": 9, "item_id": 12, "hour": 5, "genres": 7}
FEATURES = [
    {"name": "user_id", "role": "user", "vocab_size": SIZES["user_id"]},
    {"name": "item_id", "role": "item", "vocab_size": SIZES["item_id"]},
    {"name": "hour", "vocab_size": SIZES["hour"]},
    {"name": "age", "kind": "numeric", "role": "user"},
    {"name": "price", "kind": "numeric", "role": "item"},
    {"name": "genres", "kind": "sequence", "role": "item", "vocab_size": SIZES["genres"]},
    {"name": "history", "kind": "sequence", "role": "user", "shares": "item_id"},
]
SHAPE = {"embedding_dim": 4, "hidden_sizes": [8, 6], "attention_hidden_sizes": [5], "initializer_range": 0.5}


def tiny_config(architecture: str = "deepfm", **fields) -> CtrConfig:
    return CtrConfig(**({"features": FEATURES, "architecture": architecture, "prior": 0.3} | SHAPE | fields))


def tiny(architecture: str = "deepfm", **fields) -> CtrForCtrPrediction:
    """In eval mode, its biases and first-order weights not the zeros that they begin with."""
    torch.manual_seed(0)
    model = CtrForCtrPrediction(tiny_config(architecture, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".first_order." in name:
                parameter.normal_(std=0.3)
            if ".first_order.tables." in name:
                parameter[0] = 0.0
    return model


def batch(rows: int = 6, *, seed: int = 1, labels: bool = True) -> dict[str, torch.Tensor]:
    """Rows with ids of every kind, padding among them, the last row without any history."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, SIZES[name], (rows,), generator=generator) for name in ("user_id", "item_id", "hour")]
    bags = [torch.randint(0, SIZES[name], (rows, 4), generator=generator) for name in ("genres", "item_id")]
    bags[1][-1] = 0
    inputs = {
        "categorical_features": torch.stack(columns, dim=1),
        "numeric_features": torch.randn(rows, 2, generator=generator),
        "sequence_features": torch.stack(bags, dim=1),
    }
    return inputs | ({"labels": torch.randint(0, 2, (rows,), generator=generator).float()} if labels else {})
