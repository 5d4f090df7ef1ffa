"""What learning on a cloud and on devices needs whatever the engine: federated algorithms as state machines, bytes
on a wire, uploads that are checked, rounds that survive a kill. Nothing here opens a connection."""

from .availability import Alternating, Availability, Bernoulli, SleepWindow, Trace, availability_from_dict
from .averaging import FedAdam, FedAvg, FedProx, FedSGD, ServerAdam
from .block_cyclic import MCPSGD, MMPSGD, BlockSchedule, Comparison
from .exchange import AggregationLog, ClientUpdate, Payload
from .heat import (
    RandomisedResponse,
    StreamingHeat,
    epsilon_per_row,
    estimate_heat,
    exact_heat,
    heat_variance,
)
from .latest_averaging import MIFA, ClientMemory, FedLaAvg, MemoryMismatch, WaitForAll
from .protocol import FederatedAlgorithm
from .robust import Robust, clip_norm, coordinate_median, epsilon_spent, trimmed_mean
from .rounds import RoundError, RoundStore
from .submodels import FedSubAvg, RoundwiseSubmodelAvg
from .uploads import Upload, UploadError, check_upload, received_upload
from .wire import WireError, WireMeter, pack, unpack


__all__ = [
    "AggregationLog",
    "Alternating",
    "Availability",
    "Bernoulli",
    "BlockSchedule",
    "ClientMemory",
    "ClientUpdate",
    "Comparison",
    "FedAdam",
    "FedAvg",
    "FedLaAvg",
    "FedProx",
    "FedSGD",
    "FedSubAvg",
    "FederatedAlgorithm",
    "MCPSGD",
    "MIFA",
    "MMPSGD",
    "MemoryMismatch",
    "Payload",
    "RandomisedResponse",
    "Robust",
    "RoundError",
    "RoundStore",
    "RoundwiseSubmodelAvg",
    "ServerAdam",
    "SleepWindow",
    "StreamingHeat",
    "Trace",
    "Upload",
    "UploadError",
    "WaitForAll",
    "WireError",
    "WireMeter",
    "availability_from_dict",
    "check_upload",
    "clip_norm",
    "coordinate_median",
    "epsilon_per_row",
    "epsilon_spent",
    "estimate_heat",
    "exact_heat",
    "heat_variance",
    "pack",
    "received_upload",
    "trimmed_mean",
    "unpack",
]
