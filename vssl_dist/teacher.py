"""The teacher: an exponential moving average of the student, replicated and in float32."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as td
from torch import Tensor, nn

from vssl_dist import dist, state


class Teacher:
    """Keeps ``module`` a moving average of the student's parameters of the same names.

    The teacher may lack parts of the student (a predictor), never the other way round.  Its
    buffers, which are batch-norm statistics, are copies of the student's: an average of averages
    would lag twice.  In its forward pass batch norm uses the statistics of the batch, like the
    student's does.  All ranks hold the same teacher, and start from rank 0's.

    Args:
        module: Frozen here; it stays on its device.
        student: On the same device, where its tensors will stay.
        autocast_on: A device type, on which forward passes then compute in bfloat16 where
            autocast would.  DeepSpeed does that for the student alone, and around the whole loss
            it would reach the densities, which need float32.

    Raises:
        TypeError: A floating-point tensor of the teacher is not float32.
        ValueError: A tensor of the teacher has no counterpart of its shape in the student.

    >>> student, module = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> with torch.no_grad():
    ...     _, _ = student.weight.fill_(1.0), module.weight.fill_(0.0)
    >>> Teacher(module, student).update(decay=0.75)
    >>> module.weight.item()
    0.25
    """

    def __init__(
        self, module: nn.Module, student: nn.Module, autocast_on: str | None = None
    ) -> None:
        self.module = module.requires_grad_(False)
        self._parameters = _pairs(dict(module.named_parameters()), dict(student.named_parameters()))
        self._buffers = _pairs(dict(module.named_buffers()), dict(student.named_buffers()))
        if dist.world_size() > 1:
            for tensor in module.state_dict().values():
                td.broadcast(tensor, src=0)
        if autocast_on is not None:
            module.forward = torch.autocast(autocast_on, torch.bfloat16)(module.forward)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move by ``1 - decay`` towards the student: once per optimizer step, never more often."""
        if self._parameters[0]:
            torch._foreach_lerp_(*self._parameters, 1.0 - decay)
        state.copy_tensors(*self._buffers)

    def save(self, path: Path) -> None:
        """Write the teacher's tensors as plain safetensors."""
        safetensors.torch.save_file(state.cpu_state_dict(self.module), path)

    def load(self, path: Path) -> None:
        """Become what :meth:`save` wrote; a missing or unknown tensor is a ``RuntimeError``."""
        self.module.load_state_dict(safetensors.torch.load_file(path))


def _pairs(
    teacher: dict[str, Tensor], student: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    for name, tensor in teacher.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(f"teacher.{name} is {tensor.dtype}; only a float32 average moves")
        if name not in student or student[name].shape != tensor.shape:
            raise ValueError(f"teacher.{name} is not the average of anything in the student")
    return list(teacher.values()), [student[name] for name in teacher]
