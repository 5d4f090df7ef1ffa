"""A tiny task for the tests of collaboration methods."""

import tempfile
from functools import cache

import torch

from tests.trainers.device_cloud.tiny_device_cloud import arguments, rows, tiny_data, tiny_model, tiny_plan
from trainers.device_cloud.collaboration_task import CollaborationTask
from trainers.device_cloud.dc_ccl_rounds import train_cloud


CUT = "cloud_submodel.resnet.encoder.stages.0"


@cache
def _trained_state():
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        train_cloud(model, tiny_plan(), tiny_data(), arguments(folder))
    return model.state_dict()


def tiny_task(folder, **plan) -> CollaborationTask:
    """Four classes, of which the device alone has the last."""

    def model():
        found = tiny_model()
        found.load_state_dict({name: tensor.clone() for name, tensor in _trained_state().items()})
        return found

    state = torch.get_rng_state()
    _trained_state()
    torch.set_rng_state(state)
    return CollaborationTask(
        data=tiny_data(),
        model=model,
        plan=tiny_plan(**plan),
        args=arguments(folder),
        unlabelled=rows(20, (0, 1, 2, 3), seed=6),
    )
