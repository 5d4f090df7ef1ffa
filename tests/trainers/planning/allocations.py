"""What a training step really allocates, by the events of torch's CPU allocator; and the steps that tests measure."""

import contextlib
import gc
import time

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


MARK = 10_007  # bytes that nobody else asks for
GLOO_LETS_GO_AFTER = 0.005  # seconds


class InOrder(TorchDispatchMode):
    """Every collective is over before the next operation, and its buffers are freed, as on a CUDA stream.

    gloo works in threads of its own. One that is still at work, or has not been scheduled since, keeps the buffers;
    and when it is the last to hold them, the profiler, which does not watch it, counts them to the end of the run.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, torch.ScriptObject):
                    dist.Work.unbox(part).wait()
                elif func.namespace == "_c10d_functional" and torch.is_tensor(part):
                    torch.ops._c10d_functional.wait_tensor(part)
            time.sleep(GLOO_LETS_GO_AFTER)
        return result


def allocation_peak(prepare, action) -> int:
    """Most bytes that were allocated at a time while `action(prepared)` ran, with those that `prepare()` left.

    Building and loading a model may need more, which no plan is about.
    """
    gc.collect()  # what an earlier call left would be freed during this one
    with InOrder(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared = prepare()
        gc.collect()
        torch.empty(MARK, dtype=torch.uint8)
        action(prepared)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = now if event.nbytes() == MARK else max(peak, now)
    return peak


def train(model, *, batch_size, sequence_length, bf16=False, accumulation=1, steps=2):
    """`steps` AdamW steps as Trainer makes them: autocast around the forward with outputs brought back to fp32,
    gradients set to None."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 50, (batch_size, sequence_length), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        for micro in range(accumulation):
            last = micro == accumulation - 1
            with _no_sync(model, not last):
                _loss(model, ids, bf16).backward()
        optimizer.step()
        optimizer.zero_grad()


def _loss(model, ids, bf16):
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
    if bf16:
        outputs = {k: v.float() if torch.is_tensor(v) else v for k, v in outputs.items()}
    return outputs["loss"]


@contextlib.contextmanager
def _no_sync(model, off):
    """As `Accelerator.no_sync`."""
    if off and hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    elif off and hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        yield
