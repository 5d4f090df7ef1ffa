"""A model as a device runs it: one file for ONNX Runtime or for ExecuTorch, by transformers' exporters."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .budget import DeviceBudget


# Of each format: transformers' exporter and its configuration, the file, the package that writes it, our extra.
_FORMATS = {
    "onnx": ("OnnxExporter", "OnnxConfig", "model.onnx", "onnxscript", "onnx"),
    "executorch": ("ExecutorchExporter", "ExecutorchConfig", "model.pte", "executorch", "executorch"),
}


def export_for_device(
    model: PreTrainedModel,
    example: Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    format: str = "onnx",
    dynamic: bool | None = None,
    budget: DeviceBudget | None = None,
) -> Path:
    """Write `model` as a program for a device, with its configuration beside it.

    Args:
        model: such as a DC-CCL device package or a CTR model; it is exported in eval mode.
        example: arguments of the forward; their names are those of the program's inputs, its output is `logits`.
        format: `"onnx"`, or `"executorch"` for XNNPACK on the device's CPU.
        dynamic: whether the program takes other sizes than the example's. `None`: an ONNX program does; one of
            ExecuTorch does not, and takes batches of the example's size (of some models it refuses to run others).
        budget: what the device can hold, checked on the example before anything is written.

    Returns:
        The program: `model.onnx` or `model.pte` in `folder`.

    Raises:
        DeviceBudgetError: the model does not fit; nothing is written.
        ImportError: what writes the format is not installed; the message names the extra.
        ValueError: a format that is not known.

    Example:
        >>> program = export_for_device(model.device_package(), {"pixel_values": images}, "device-onnx")
        >>> session = onnxruntime.InferenceSession(program)
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r} is not known. Choose one of {tuple(_FORMATS)}.")
    exporter, config, name, package, extra = _FORMATS[format]
    if budget is not None:
        budget.check(model, dict(example))
    if find_spec(package) is None:
        raise ImportError(f"format={format!r} needs {package}: pip install 'hf-sigma[{extra}]'.")
    from transformers import exporters  # not before: it imports the backends that are installed

    options = getattr(exporters, config)(dynamic=format == "onnx" if dynamic is None else dynamic)
    training = model.training
    try:
        exported = getattr(exporters, exporter)().export(model.eval(), dict(example), config=options)
    finally:
        model.train(training)
    exported.save_pretrained(folder)
    return Path(folder) / name


__all__ = ["export_for_device"]
