"""The step of a full batch as one CUDA graph: forward, backward, clipping, optimizer and average.

Launched one by one, the kernels of a step of W32 keep an H200 busy half of the time (docs/train-step.md).
Recorded once a start and replayed for every full batch: what changes from batch to batch lies in tensors, the
rows in buffers of the recording's own, the learning rate in the optimizer's. Gradients are made inside, in
the recording's memory. Where recording fails, training goes on by launches, and says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hrnet_core.errors import first_line
from pipelines.training.batch import Sent
from pipelines.training.state import Training, make_scaler

WARM = 3
"""Steps before recording: libraries choose their kernels, and the optimizer's state comes to be."""
CHECKED = 2
"""So many losses of the recording are held against theirs: the second has a whole step behind it."""
SAME = 1e-3
"""Of the loss: how much it may differ. Two launched runs in 16 bits differ by 2e-5 in the second step."""


def record(run: Training, step: Callable[[Sent], Tensor], sent: Sent) -> Callable[[Sent], Tensor]:
    """`step` recorded, with a full batch to try it on; `step` itself where that fails. The run stands where
    it stood: weights, BatchNorm, optimizer, scaler and average."""
    try:
        return _record(run, step, sent)
    except _NotTheSame as error:
        why = str(error)
    except RuntimeError as error:  # CUDA's errors are such
        why = first_line(error)
    # What a capture left half done in it would refuse the next step.
    scale, run.scaler = run.scaler.state_dict(), make_scaler(run.config.train, run.device)
    run.scaler.load_state_dict(scale)
    run.optimizer.zero_grad(set_to_none=True)
    print(
        f"train.graph: not recorded, steps are launched kernel by kernel, which is slower: {why}", flush=True
    )
    return step


def _record(run: Training, step: Callable[[Sent], Tensor], sent: Sent) -> Callable[[Sent], Tensor]:
    inputs = (sent[0].clone(), sent[1].clone(), sent[2].clone())
    main, stream = torch.cuda.current_stream(run.device), torch.cuda.Stream(run.device)
    with as_it_was(run):
        stream.wait_stream(main)  # for what is to be put back, too
        with torch.cuda.stream(stream):
            launched = [step(inputs) for _ in range(WARM)]
        main.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer one is for a capture that fails, which leaves its own stream behind. thread_local: the feed's
    # threads lock memory meanwhile.
    capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with torch.cuda.stream(main), capture:
        loss = step(inputs)

    def replay(given: Sent) -> Tensor:
        for own, other in zip(inputs, given, strict=True):
            own.copy_(other)
        graph.replay()
        return loss.clone()  # the next replay writes over it

    with as_it_was(run):
        replayed = torch.stack([replay(sent) for _ in range(CHECKED)])
    expected = torch.stack(launched[:CHECKED])
    if not torch.allclose(replayed, expected, rtol=SAME, atol=0, equal_nan=True):
        raise _NotTheSame(
            f"its losses {replayed.tolist()} are not those of the same steps launched, {expected.tolist()}"
        )
    return replay


class _NotTheSame(Exception):
    """The recording computes something else than what it was recorded of."""


@contextlib.contextmanager
def as_it_was(run: Training) -> Iterator[None]:
    """What the steps of the block change in weights, BatchNorm, optimizer, scaler and average is undone after
    it, in place. What the optimizer had not begun is then as it would begin it: zero."""
    before = {id(tensor): tensor.detach().clone() for tensor in _state(run)}
    scale = run.scaler.state_dict()
    try:
        yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for tensor in _state(run):
                tensor.copy_(before[id(tensor)]) if id(tensor) in before else tensor.zero_()
        run.scaler.load_state_dict(scale)


def _state(run: Training) -> Iterator[Tensor]:
    """The tensors that steps change, each the same object as long as the run lasts."""
    for network in (run.model, run.average and run.average.network):
        if network is not None:
            yield from network.parameters()
            yield from network.buffers()
    for state in run.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
