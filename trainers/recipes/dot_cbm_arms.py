"""The arms that DOT-CBM is compared in: names for fields of the bottleneck, all else being equal."""

from typing import Any

from hf_models.dot_cbm.configuration_dot_cbm import READOUTS

from .dot_cbm_fit import BottleneckArguments, best_saliency


_PLAIN = {
    "readout": "conditional",
    "saliency": "uniform",
    "concept_prior": "uniform",
    "lambda_vop": 0.0,
    "lambda_top": 0.0,
}
_ORTHOGONAL = {"lambda_vop": 0.15, "lambda_top": 0.2}
ARMS: dict[str, dict[str, Any]] = {
    "conditional": _PLAIN,
    "conditional_prior": _PLAIN | {"saliency": "best"},
    "conditional_prior_cls": _PLAIN | {"saliency": "cls_dot"},
    "conditional_orthogonal": _PLAIN | _ORTHOGONAL,
    "conditional_both": _PLAIN | _ORTHOGONAL | {"saliency": "best", "concept_prior": "cooccurrence"},
    "conditional_mask_prior": _PLAIN | {"saliency": "mask"},
    **{readout: _PLAIN | {"readout": readout} for readout in READOUTS if readout not in ("conditional", "cem")},
    # As its paper trains it, with the loss of the task beside that of the concepts; without its random interventions.
    "cem": _PLAIN | {"readout": "cem", "training_stage": "joint"},
}
# Fields that every arm decides.
DECIDED_BY_ARMS = tuple(_PLAIN)
LABELS = {
    "conditional": "OT",
    "conditional_prior": "OT + prior, best saliency",
    "conditional_prior_cls": "OT + prior, CLS . patch (paper)",
    "conditional_orthogonal": "OT + orthogonality",
    "conditional_both": "OT + both priors + orthogonality",
    "conditional_mask_prior": "OT + prior, true mask (oracle)",
    "dot": "max cosine, no OT",
    "mean": "mean cosine, no OT",
    "vanilla": "vanilla CBM",
    "cem": "CEM-style, trained jointly",
    "linear_probe": "linear probe, no concepts",
    "literal": "OT, Eq. 12 as printed",
}


def fields_of(arm: str, args: BottleneckArguments, aucs: dict[str, float]) -> dict[str, Any]:
    """The fields of the model's configuration in which an arm differs from `args`, the best saliency filled in.

    Raises:
        ValueError: no such arm.
    """
    if arm not in ARMS:
        raise ValueError(f"arm {arm!r} is not known. Choose from {', '.join(ARMS)}.")
    return filled(ARMS[arm], args, aucs)


def filled(fields: dict[str, Any], args: BottleneckArguments, aucs: dict[str, float]) -> dict[str, Any]:
    """`fields` with `saliency="best"` as the form that it is on these tokens."""
    saliency = fields.get("saliency", args.saliency)
    return fields | {"saliency": best_saliency(aucs) if saliency == "best" else saliency}


__all__ = ["ARMS", "DECIDED_BY_ARMS", "LABELS", "fields_of", "filled"]
