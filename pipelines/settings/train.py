"""Settings of a training run: who works, what is learnt, and how. No torch here: `--help` is fast.

A section of a RunConfig (config.py), where all settings of all verbs meet. The recipes that set them:
docs/recipes.md.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hrnet_core.choices import Noise
from pipelines.settings.section import Section

WORKERS = (
    *("num_workers", "use_gpu", "cpus_per_worker", "log_every", "checkpoint_minutes", "max_failures"),
    *("graph", "compile", "compile_cache", "max_skipped_steps"),
)
"""Settings of TrainSettings that say who works and how it is told, not what is learnt."""


class TrainSettings(Section):
    num_workers: int = Field(default=1, ge=1)
    """DDP workers: processes on CPU (gloo), GPUs with use_gpu (NCCL). Must divide `lanes`."""
    use_gpu: bool = False
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs of a worker, and the threads that read, decode and draw its batches, which do not depend on it.
    Without use_gpu also the threads of its network, whose results do, by rounding only."""
    epochs: int = Field(default=210, ge=1)
    batch_size: int = Field(default=128, ge=1)
    """Global batch, over all workers."""
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """The published runs used none: their yaml names 1e-4, their Adam never received it."""
    decay_norms: bool = True
    """Whether weight_decay is for BatchNorm and biases too; off: for convolutions only."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Gradients of a step are scaled down to this norm over all weights; 0: never (the published runs)."""
    accumulate: int = Field(default=1, ge=1)
    """A worker's rows go through the network in this many equal parts, with one optimizer step for all: less
    memory. The same as one batch up to BatchNorm, which counts over each part."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Scored and saved is a moving average of the weights and of BatchNorm's statistics: after each step,
    decay x average + (1 - decay) x weights. RTMPose: 0.9998. 0: the weights alone (the published runs)."""
    ema_warmup: bool = False
    """The decay of step n (from 0) is at most (1 + n) / (10 + n): a young average is of the last ninth of the
    steps, and not of the weights that the run began with, which 0.9998 has forgotten after 10,000 steps."""
    schedule: Literal["step", "cosine", "flat_cosine"] = "step"
    """step: x gamma at each milestone. cosine: to zero over the run, stepped every batch. flat_cosine: flat
    for half of the run, then by a cosine to a twentieth (RTMPose)."""
    milestones: tuple[int, ...] = (170, 200)
    """Epochs (counted from 0) that start with a lower rate, as the published runs did."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up, in batches."""
    loss: Literal["official", "linear"] = "official"
    """official: factor 0.5 and squared weights. linear: mmpose's, weights linear, no 0.5."""
    joint_weights: bool = False
    """Multiply weights by the skeleton's joint weights (off in the published runs)."""
    ohkm: int = Field(default=0, ge=0)
    """Keep only this many hardest keypoints of each person in the loss; 0: all."""
    teacher: str | None = None
    """Checkpoint folder, or URI of one, of a heavier network trained on the same shards: its heatmaps are
    mixed into the targets (docs/recipes.md)."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """Of the teacher's heatmaps in the targets."""
    views: Literal["stored", "device"] = "stored"
    """stored: the shards' precomputed heatmaps. device: fresh views each epoch, made on the worker's device
    from shards with data.context 2.0."""
    photometric: float = Field(default=0.0, ge=0, le=1)
    """Probability with which brightness, contrast, saturation, hue and order of channels of a crop change,
    each by itself. mmpose: 0.5. As the next two, with stored and fresh views (docs/recipes.md)."""
    coarse_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability of 1 to 8 black rectangles in a crop. mmpose: 0.5."""
    information_dropping: float = Field(default=0.0, ge=0, le=1)
    """Probability that an ellipse covers a keypoint of the person, or a part of its box (AID)."""
    dropping_from: float = Field(default=0.0, ge=0, lt=1)
    """Share of the epochs after which information dropping begins: early, a network has not yet learnt what
    is to be dropped."""
    channels_last: bool = True
    """Memory layout of the network; the result differs by rounding only."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16, float16: autocast in training; weights, optimizer and loss stay float32. float16 scales the
    loss by torch.amp.GradScaler. On a CPU bfloat16 is faster with AMX alone, float16 never."""
    graph: bool | None = None
    """Record the step of a full batch as CUDA graphs and replay them: kernels are not launched one by one.
    Several workers then average gradients after the backward, where DDP does it meanwhile: off for a slow
    network between them (docs/train-step.md). None: with use_gpu."""
    compile: bool = False
    """BasicBlock, Bottleneck and Fusion through torch.compile, forward and backward; pays with `graph`. Needs
    a C++ compiler on a CPU, Triton on a GPU. Off, because the first start takes a minute or more longer."""
    compile_cache: str | None = None
    """Folder of the worker's machine for what is compiled, as evaluate.compile_cache. A copy is kept in
    STORAGE/compiled, from which another machine starts."""
    flip_test: bool = True
    """Average with the mirror image in the AP of each epoch."""
    validate_every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch always validates."""
    early_stop: int = Field(default=0, ge=0)
    """End the run after so many validations in a row without a better AP; 0: never (the published runs, whose
    AP rises most after epoch 170)."""
    early_stop_min_delta: float = Field(default=0.0, ge=0, lt=1)
    """By how much an AP must be above the last that counted as better."""
    lanes: int = Field(default=8, ge=1)
    """Rows are dealt to this many lanes; the order does not depend on the number of workers."""
    shuffle_row_groups: int = Field(default=8, ge=1)
    """Rows are shuffled in windows of this many row groups a lane; two windows of all lanes are in memory."""
    log_every: int = Field(default=10, ge=1)
    """Steps between rows of metrics."""
    checkpoint_minutes: float = Field(default=10.0, gt=0)
    """A checkpoint inside an epoch at least this often."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts after a lost worker; -1 is without limit."""
    max_skipped_steps: int = Field(default=10, ge=1)
    """A batch whose gradient is not finite changes nothing and is counted (train/skipped_steps); so many in a
    row end the run. Looked at each log_every steps."""
    seed: int = Field(default=0, ge=0)

    def noise(self, epoch: int) -> Noise:
        """What is done to the crops of an epoch, counted from 0."""
        late = epoch >= self.dropping_from * self.epochs
        return Noise(self.photometric, self.coarse_dropout, self.information_dropping if late else 0.0)

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.lanes % self.num_workers:
            raise ValueError(
                f"train.num_workers {self.num_workers} must divide train.lanes {self.lanes}: "
                f"choose a divisor, or set --train.lanes to a multiple (the sample order follows from it)"
            )
        if self.batch_size % self.lanes:
            raise ValueError(
                f"train.batch_size {self.batch_size} must be a multiple of train.lanes {self.lanes}"
            )
        if self.batch_size % (self.num_workers * self.accumulate):
            raise ValueError(
                f"train.accumulate {self.accumulate} must divide the {self.batch_size // self.num_workers} "
                f"rows that each worker has of train.batch_size {self.batch_size}"
            )
        if self.graph and not self.use_gpu:
            raise ValueError("train.graph records the step of a worker on its GPU: it needs train.use_gpu")
        return self

    @property
    def recorded(self) -> bool:
        """Whether full batches are to be replayed."""
        return self.use_gpu if self.graph is None else self.graph
