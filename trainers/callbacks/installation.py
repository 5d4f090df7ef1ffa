"""How callbacks that add to the logs reach the reporters, and how they find the model that routes."""

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback


def install_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Add `callbacks` ahead of TensorBoard, the progress bar and the like.

    `Trainer(callbacks=...)` puts them last, where what they add in `on_log` is seen by no reporter. They come right
    after `DefaultFlowCallback`, so that `control.should_log` is already decided when they run.
    """
    handler = trainer.callback_handler
    flow = [i for i, callback in enumerate(handler.callbacks) if isinstance(callback, DefaultFlowCallback)]
    position = flow[0] + 1 if flow else 0
    handler.callbacks[position:position] = list(callbacks)
    for callback in callbacks:
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def require_steps(trainer: Trainer, what: str, instead: str) -> None:
    """`ValueError` for a trainer whose steps are rounds of clients' steps, such as `FederatedTrainer`: `what` would
    wait there for steps, loaders or checkpoints that never come. `instead`: what to do."""
    # By what it can do, not by its class: trainers.federated stands above this package.
    if hasattr(trainer, "close_round"):
        raise ValueError(
            f"{what} has nothing to work on in a {type(trainer).__name__}, whose steps are rounds. {instead}"
        )


def routed_model(model: torch.nn.Module) -> PreTrainedModel:
    """The outermost Sigma-MoE model inside `model` (PEFT and other wrappers allowed). `TypeError` if there is none."""
    for module in model.modules():
        # By what it can do, not by its class: the same class loaded from a Hub repository is another object.
        if isinstance(module, PreTrainedModel) and hasattr(module, "set_experts_per_token"):
            return module
    raise TypeError(
        f"{type(model).__name__} holds no Sigma-MoE model, so there are no routers to work on. Use a model of "
        "hf_models.moe."
    )


def add_to_log(state, logs: dict, extra: dict) -> None:
    """Put `extra` into this log event: what reporters further on see, and what `trainer_state.json` keeps."""
    logs.update(extra)
    if state.log_history:
        state.log_history[-1].update(extra)
