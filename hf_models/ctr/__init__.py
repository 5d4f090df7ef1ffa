"""Click-through rate: LR, Wide & Deep, PNN, DeepFM and DIN over features that the config describes."""

from ..registration import register_family
from .configuration_ctr import CtrConfig
from .fields import TouchedRows
from .modeling_ctr import CtrForCtrPrediction, CtrModel, CtrPreTrainedModel
from .outputs import CtrModelOutput, CtrOutput


def register() -> None:
    """Register the family with transformers' Auto classes."""
    register_family(CtrConfig, {"AutoModel": CtrModel, "AutoModelForSequenceClassification": CtrForCtrPrediction})


__all__ = [
    "CtrConfig",
    "CtrForCtrPrediction",
    "CtrModel",
    "CtrModelOutput",
    "CtrOutput",
    "CtrPreTrainedModel",
    "TouchedRows",
    "register",
]
