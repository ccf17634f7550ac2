"""Student under DeepSpeed, teacher beside it, one training step.

Rounding apart, a step is that of one process on the whole global batch, at every ZeRO stage:
batch norm and noise see all ranks' images, and gradients are averaged in float32.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vssl_dist import dist, pickles, schedule, state
from vssl_dist.checkpoint import load_on_all_ranks, run_on_all_ranks
from vssl_dist.config import RunConfig
from vssl_dist.environment import hidden_module
from vssl_dist.errors import CheckpointError
from vssl_dist.exports.card import ExportDescription
from vssl_dist.exports.write import TensorsByPart, write_export
from vssl_dist.gradients import ShardedGradient, WholeGradient
from vssl_dist.methods.base import GlobalNoise, LossOutput, Method, MicroStep
from vssl_dist.models.norm import synchronise
from vssl_dist.optim import apply_schedules, build_optimizer
from vssl_dist.teacher import Teacher

if TYPE_CHECKING:
    from vssl_dist.data.loader import Batch

TAG = "deepspeed"
PATIENCE = 10
OVERLAPPING_BUCKET = 8 * 2**20
"""Values of a gradient that are sent together, 32 MB of them, while the next are computed."""


class Diverged(RuntimeError):
    """Training has failed: no step was possible for ``PATIENCE`` steps on end, on any batch."""


class Engine:
    """Trains ``method``; its ``student`` becomes the DeepSpeed engine, which is called alike.

    A step whose loss (on any rank) or gradient is not finite is skipped by all: weights,
    optimizer, teacher and batch-norm statistics stay, only ``step`` goes on, as its images are
    used up.  That takes no vote: a non-finite loss makes its own gradient NaN, gradients reach
    all ranks anyway, and their norm is read once per step.

    Args:
        cfg: The run.
        method: Networks and loss, on the CPU; rank 0's initial weights count.
        total_steps, steps_per_epoch: In optimizer steps: where the schedules and warm-up end.
        device: ``"cpu"`` or ``"cuda"``; the process group must be up, also for one rank.
    """

    def __init__(
        self,
        cfg: RunConfig,
        method: Method,
        *,
        total_steps: int,
        steps_per_epoch: float,
        device: str,
    ) -> None:
        self.cfg = cfg
        self.method = method
        self.device = device
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.skipped = 0
        self.skipped_on_end = 0
        self.student = synchronise(method.student).train().to(device)
        self.optimizer = build_optimizer(cfg.optim, self.student)
        self.ds = under_deepspeed(cfg, self.student, self.optimizer, device)
        self.ds.checkpoint_engine.load = bind(
            pickles.load_with_allowed_globals, pickles.allowed_globals_by_file(**self._layout())
        )
        method.student = self.ds
        gradient = ShardedGradient if cfg.engine.zero_stage > 0 else WholeGradient
        self.gradient = gradient(self.ds, self.student, cfg.optim.clip)
        self.teacher: Teacher | None = None
        self._buffers = list(self.student.buffers())
        if method.teacher is not None:
            method.teacher = synchronise(method.teacher).train().to(device)
            cast = None if cfg.engine.autocast == "none" else device
            self.teacher = Teacher(method.teacher, self.student, autocast_on=cast)
            self._buffers += method.teacher.buffers()
        self._buffers_before_step = [buffer.clone() for buffer in self._buffers]

    def train_step(
        self, batches: Sequence[Batch], by_part: bool = False, *, with_metrics: bool = True
    ) -> LossOutput:
        """Take one optimizer step, then one step of the teacher.

        Args:
            batches: ``accumulate`` micro-batches of this rank, in order.
            by_part: Add the norms of ``NormByPart`` to the metrics.
            with_metrics: Whether anyone will read the metrics; otherwise there are none, as they
                are a few dozen kernels a step.

        Returns:
            This rank's loss and metrics, means over the micro-steps, with ``lr``,
            ``weight_decay``, ``ema_decay``, ``grad_norm`` (of the global batch, before clipping;
            infinite in a skipped step) and ``skipped_steps`` (so far) added.

        Raises:
            Diverged: On all ranks, after ``PATIENCE`` skipped steps on end.
        """
        optim = self.cfg.optim
        if len(batches) != optim.accumulate:
            raise ValueError(f"{len(batches)} micro-batches, but {optim.accumulate=}")
        rates = apply_schedules(
            self.optimizer, optim, self.step, self.total_steps, self.steps_per_epoch
        )
        decay = schedule.cosine(self.step, self.total_steps, *self.cfg.engine.ema_decay)
        # Forward passes move batch-norm statistics, which a skipped step must put back.
        state.copy_tensors(self._buffers_before_step, self._buffers)
        outs = [self._micro_step(n, batch, with_metrics) for n, batch in enumerate(batches)]
        grad_norm = self.gradient.step()
        self.skipped_on_end = self.skipped_on_end + 1 if self.gradient.was_skipped else 0
        if self.skipped_on_end:
            self._skip()
        elif self.teacher:
            self.teacher.update(decay)
        self.step += 1
        loss = torch.stack([o.loss for o in outs]).mean()
        if not with_metrics:
            return LossOutput(loss, outs[-1].embedding)
        means = {key: torch.stack([o.metrics[key] for o in outs]).mean() for key in outs[0].metrics}
        rates |= {"ema_decay": decay, "skipped_steps": self.skipped}
        for key, value in rates.items():
            means[key] = torch.full((), value, dtype=torch.float64, device=self.device)
        norms = self.gradient.norm_by_part.read() if by_part else {}
        metrics = means | {"grad_norm": grad_norm} | norms
        return LossOutput(loss, outs[-1].embedding, lambda: metrics)

    def _micro_step(self, number: int, batch: Batch, with_metrics: bool) -> LossOutput:
        """Forward and backward; the last one of a step is concluded by ``gradient.step``."""
        views: Sequence[Tensor] = batch.views
        if self.cfg.engine.channels_last:
            # Convolutions keep the layout.  The weights stay as they are: views of flat vectors.
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        noise = GlobalNoise(
            self.cfg.seed, self.step, number, dist.rank(), dist.world_size(), self.device
        )
        micro_step = MicroStep(noise, self.step / self.steps_per_epoch, batch.labels)
        out = self.method.loss(views, micro_step)
        metrics = out.metrics if with_metrics else {}
        loss = out.loss.detach()
        # An infinite loss may have a finite gradient; here it must not.
        self.ds.backward(out.loss * torch.where(loss.isfinite(), 1.0, torch.nan))
        if number + 1 < self.cfg.optim.accumulate:
            self.ds.step()
        return LossOutput(loss, out.embedding, lambda: metrics)

    def _skip(self) -> None:
        state.copy_tensors(self._buffers, self._buffers_before_step)
        self.skipped += 1
        if self.skipped_on_end == PATIENCE:
            raise Diverged(
                f"loss or gradient not finite in {PATIENCE} steps on end, the last of them step "
                f"{self.step}: continue from an earlier checkpoint, or lower optim.base_lr"
            )

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on; every rank calls this.

        Raises:
            Exception: What writing raises, on the rank that cannot; on all, if a weight is NaN.
        """
        finite = all(bool(p.isfinite().all()) for p in self.student.parameters())
        if dist.any_rank(not finite):
            raise CheckpointError(f"the weights after step {self.step} are not finite")
        try:
            self.ds.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except Exception:
            dist.barrier()  # the one at the end of save_checkpoint, where the others wait
            raise
        states_path = folder / f"generators-{dist.rank():05d}.json"
        states_path.write_text(json.dumps(state.generator_states()))
        if dist.rank() == 0:
            for program in folder.glob("*.py"):  # DeepSpeed's, to be run by whoever finds them
                program.unlink()
            facts = {"step": self.step, "skipped": self.skipped} | self._layout()
            facts["optimizer_groups"] = len(self.optimizer.param_groups)
            (folder / "engine.json").write_text(json.dumps(facts))
            if self.teacher:
                self.teacher.save(folder / "teacher.safetensors")

    def load(self, folder: Path) -> None:
        """Continue as if :meth:`save` had just returned; every rank calls this.

        The files count as whole and our own: ``checkpoint.find_newest_checkpoint`` has verified
        them.  That says nothing of who wrote them first, so nothing that they name is called: see
        `pickles`.

        Raises:
            CheckpointError: One line, on all ranks: they were written by another number of ranks
                or ZeRO stage, could run code, or do not fit this network.
        """
        path = folder / "engine.json"
        names = ("step", "skipped", *self._layout())
        facts = load_on_all_ranks(path, lambda: json.loads(path.read_text()))
        load_on_all_ranks(path, lambda: state.require_counts(facts, names))
        for key, value in self._layout().items():
            if facts[key] != value:
                raise CheckpointError(f"{folder} was saved with {key} {facts[key]}, not {value}")
        groups = len(self.optimizer.param_groups)
        is_sharded_lars = self.cfg.optim.name == "lars" and self.cfg.engine.zero_stage > 0
        if is_sharded_lars and facts.get("optimizer_groups") != groups:
            raise CheckpointError(
                f"{folder} holds a shard of LARS per weight, as versions before this one cut it: "
                "finish the run with the version that began it, or begin it anew under another name"
            )
        files = pickles.allowed_globals_by_file(**self._layout())
        run_on_all_ranks(lambda: pickles.check_pickle_globals(folder / TAG, files))
        load_on_all_ranks(folder, lambda: self._restore(folder))
        self.step = facts["step"]
        self.skipped = facts["skipped"]
        self.skipped_on_end = 0

    def _restore(self, folder: Path) -> None:
        self.ds.load_checkpoint(str(folder), tag=TAG)
        if self.cfg.engine.zero_stage > 0:
            # Of versions in which DeepSpeed clipped it brings the limit back: that is done here.
            self.ds.optimizer.clip_grad = 0.0
        if self.teacher:
            self.teacher.load(folder / "teacher.safetensors")
        states_path = folder / f"generators-{dist.rank():05d}.json"
        state.restore_generator_states(json.loads(states_path.read_text()))

    def _layout(self) -> dict[str, int]:
        return {"world_size": dist.world_size(), "zero_stage": self.cfg.engine.zero_stage}

    def export(
        self, path: Path, description: ExportDescription, more: TensorsByPart | None = None
    ) -> None:
        """Write the evaluated branch as an export on rank 0; every rank calls this.

        Raises:
            CheckpointError: On all ranks, if rank 0 cannot write.
        """
        teacher = self.teacher if self.method.evaluated == "teacher" else None
        network = teacher.module if teacher else self.student
        run_on_all_ranks(lambda: write_export(path, network, description, more), only_on=0)

    def digests(self) -> dict[str, str]:
        """Compute sha256 of ``weights`` (with buffers), ``optimizer`` and ``teacher``.

        Every rank calls this.  Where the ranks differ, as with ZeRO's shards, the digest is that
        of all ranks' digests.
        """
        states = {
            "weights": self.student.state_dict(),
            "optimizer": [self.optimizer.state_dict(), self.optimizer.param_groups],
            "teacher": self.teacher.module.state_dict() if self.teacher else {},
        }
        digests = {name: dist.gather(state.nested_digest(value)) for name, value in states.items()}
        return {
            name: per_rank[0] if len(set(per_rank)) == 1 else state.nested_digest(per_rank)
            for name, per_rank in digests.items()
        }


def ds_config(cfg: RunConfig, world_size: int, size: int, device: str) -> dict[str, Any]:
    """Build the dictionary for ``deepspeed.initialize``; there is no second file that could drift.

    Args:
        cfg: The run.
        world_size: Ranks.
        size: Parameters of the student.
        device: ``"cpu"`` or ``"cuda"``.
    """
    stage = cfg.engine.zero_stage
    bucket = size + size % 2  # it takes no odd ones
    # A GPU sends one bucket while it computes the next; a CPU has nothing else to send with.
    overlaps = device == "cuda" and stage > 0
    return {
        "train_micro_batch_size_per_gpu": cfg.micro_batch(world_size),
        "gradient_accumulation_steps": cfg.optim.accumulate,
        # Unset means 1.0.  Clipping is `vssl_dist.gradients`'s, which has the norm already.
        "gradient_clipping": 0.0,
        # Not "bf16", which casts the student itself, batch norm and all.  The empty list: there
        # is no module whose gradients may be averaged in bfloat16.
        "torch_autocast": {
            "enabled": cfg.engine.autocast != "none",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # Buckets are allocated in full, at every step: no larger than what there is to send.
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(bucket, OVERLAPPING_BUCKET) if overlaps else bucket,
            "overlap_comm": overlaps,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def under_deepspeed(
    cfg: RunConfig, student: nn.Module, optimizer: torch.optim.Optimizer, device: str
) -> Any:
    """Wrap the student in a DeepSpeed engine, which is called alike.

    Args:
        cfg: The run.
        student: Network, already on ``device``.
        optimizer: Optimizer of the student's parameters.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read on import
    # Here, because a login node has no use for it.  Its tuner tries to import MLflow, which brings
    # pandas and a web server into every rank: 2,400 files and 110 MB.
    with hidden_module("mlflow"):
        import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls, at every step, what torch has since given another name.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    # On a CPU it would compile an all-reduce for inference, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    size = sum(p.numel() for p in student.parameters())
    config = ds_config(cfg, dist.world_size(), size, device)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    if dist.world_size() == 1 and cfg.engine.zero_stage == 0:
        # It would flatten the whole gradient, send it to nobody and copy it back.
        engine.enable_backward_allreduce = False
    if cfg.engine.compile:
        engine.compile()
    return engine
