"""The step of a full batch as two CUDA graphs: forward and backward; clipping, optimizer and average.

Launched one by one, the kernels of a step of W32 keep an H200 busy half of the time (docs/train-step.md).
Recorded once a start and replayed for every full batch: what changes from batch to batch lies in tensors, the
rows in buffers of the recording's own, the learning rate in the optimizer's. Between the two, workers average
their gradients, by a launch. Where recording fails, training goes on by launches, and says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrnet_core.errors import first_line
from pipelines.training.batch import Sent
from pipelines.training.ddp import all_sum
from pipelines.training.state import Training, make_scaler

WARM = 3
"""Steps before recording: libraries choose their kernels, and the optimizer's state comes to be."""
CHECKED = 2
"""So many losses of the recording are held against theirs: the second has a whole step behind it."""
SAME = 1e-3
"""Of the loss: how much it may differ. Two launched runs in 16 bits differ by 2e-5 in the second step."""


class Halves(NamedTuple):
    """A step, before and after workers average their gradients."""

    gradients: Callable[[Sent], Tensor]
    update: Callable[[Tensor], Tensor]
    """Of the loss that the first half gave."""


def record(
    run: Training, step: Callable[[Sent], Tensor], halves: Halves, sent: Sent
) -> Callable[[Sent], Tensor]:
    """`step`, whose halves these are, recorded, with a full batch to try it on; `step` itself where that
    fails for one of the workers. All together. The run stands where it stood: weights, BatchNorm, optimizer,
    scaler and average.

    A worker that could not record launches while the others try their recording, so that all meet as often.
    """
    inputs = (sent[0].clone(), sent[1].clone(), sent[2].clone())
    main, stream = torch.cuda.current_stream(run.device), torch.cuda.Stream(run.device)
    with as_it_was(run):
        stream.wait_stream(main)  # for what is to be put back, too
        with torch.cuda.stream(stream):
            launched = torch.stack([step(inputs) for _ in range(WARM)][:CHECKED])
        main.wait_stream(stream)
    recorded, why = step, ""
    try:
        # The outer one is for a capture that fails, which leaves its own stream behind.
        with as_it_was(run), torch.cuda.stream(main):
            recorded = _record(run, halves, inputs, stream)
    except RuntimeError as error:  # CUDA's errors are such
        why = first_line(error)
        _forget_half(run)
    with as_it_was(run):
        found = torch.stack([recorded(sent) for _ in range(CHECKED)])
    if not why and not torch.allclose(found, launched, rtol=SAME, atol=0, equal_nan=True):
        why = f"its losses {found.tolist()} are not those of the same steps launched, {launched.tolist()}"
    if why:
        print(
            f"train.graph: not recorded, steps are launched kernel by kernel, which is slower: {why}",
            flush=True,
        )
    failed = all_sum(torch.tensor(float(bool(why)), device=run.device), run.world)
    return step if failed else recorded


def _record(
    run: Training, halves: Halves, inputs: Sent, stream: torch.cuda.Stream
) -> Callable[[Sent], Tensor]:
    """The halves as graphs, each replayed once; what the replays changed is the caller's to put back."""
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # thread_local: the feed's threads lock memory meanwhile.
    with torch.cuda.graph(first, stream=stream, capture_error_mode="thread_local"):
        loss = halves.gradients(inputs)
    # In the same memory: the second never runs while the first does, and begins with what that left.
    with torch.cuda.graph(second, pool=first.pool(), stream=stream, capture_error_mode="thread_local"):
        updated = halves.update(loss)

    def replay(given: Sent) -> Tensor:
        for own, other in zip(inputs, given, strict=True):
            own.copy_(other)
        first.replay()
        if run.shared is not None:
            run.shared.average()
        second.replay()
        return updated.clone()  # the next replay writes over it

    # A first launch takes memory. If there is none, it is known before the workers meet.
    first.replay()
    second.replay()
    torch.cuda.synchronize(run.device)
    return replay


def _forget_half(run: Training) -> None:
    """What a capture left half done in scaler and gradients, and what would refuse the next step."""
    scale, run.scaler = run.scaler.state_dict(), make_scaler(run.config.train, run.device)
    run.scaler.load_state_dict(scale)
    run.optimizer.zero_grad(set_to_none=True)


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
    for network in (run.model, run.average.network if run.average else None):
        if network is not None:
            yield from network.parameters()
            yield from network.buffers()
    for state in run.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
