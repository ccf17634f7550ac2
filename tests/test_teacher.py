"""The teacher moves like an exponential moving average does, or says why it cannot."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vssl_dist.teacher import Teacher


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        self.predictor = nn.Linear(3, 3)

    def forward(self, view: Tensor) -> Tensor:
        return self.predictor(self.backbone(view))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)

    def forward(self, view: Tensor) -> Tensor:
        return self.backbone(view)  # type: ignore[no-any-return]


def walk(student: nn.Module, steps: int, teacher: Teacher, decay: float) -> list[Tensor]:
    """Random steps of the student, each followed by the teacher's; the first weight's history."""
    history = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        history.append(next(student.parameters()).detach().double().clone())
        teacher.update(decay)
    return history


def test_it_is_the_weighted_mean_of_all_students_so_far() -> None:
    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(Encoder(student), student)
    start = next(teacher.module.parameters()).double().clone()
    decay, steps = 0.99, 300
    history = walk(student, steps, teacher, decay)
    want = decay**steps * start + sum(
        (1 - decay) * decay ** (steps - 1 - number) * weight
        for number, weight in enumerate(history)
    )
    got = next(teacher.module.parameters()).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_at_decay_one_it_stays_and_at_zero_it_is_the_student() -> None:
    student = Student()
    teacher = Teacher(Encoder(student), student)
    before = copy.deepcopy(teacher.module.state_dict())
    walk(student, 1, teacher, decay=1.0)
    weight = "backbone.0.weight"
    assert torch.equal(teacher.module.state_dict()[weight], before[weight])
    walk(student, 1, teacher, decay=0.0)
    assert torch.equal(teacher.module.state_dict()[weight], student.state_dict()[weight])


def test_batch_norm_statistics_are_copies_of_the_students() -> None:
    student = Student()
    teacher = Teacher(Encoder(student), student)
    student(torch.randn(8, 4) + 3)
    teacher.module(torch.randn(8, 4) - 3)
    teacher.update(0.9)
    for name, buffer in teacher.module.named_buffers():
        assert torch.equal(buffer, student.state_dict()[name])


def test_it_is_frozen_and_the_student_is_not() -> None:
    student = Student()
    teacher = Teacher(Encoder(student), student)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_type_but_float32_is_refused(dtype: torch.dtype) -> None:
    student = Student()
    with pytest.raises(TypeError, match=rf"teacher\.backbone\.0\.weight is {dtype}"):
        Teacher(Encoder(student).to(dtype), student)


def test_a_part_that_the_student_lacks_is_refused() -> None:
    student = Student()
    bare = nn.ModuleDict({"backbone": copy.deepcopy(student.backbone)})
    with pytest.raises(ValueError, match=r"teacher\.predictor\.weight is not the average"):
        Teacher(copy.deepcopy(student), bare)


def test_under_autocast_it_computes_in_bfloat16_and_stays_float32() -> None:
    student = Student()
    encoder = Encoder(student)
    encoder.backbone = nn.Sequential(encoder.backbone[0])
    teacher = Teacher(encoder, student, autocast_on="cpu")
    assert teacher.module(torch.randn(2, 4)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in teacher.module.parameters())


def test_what_it_saves_it_becomes(tmp_path: Path) -> None:
    student = Student()
    one = Teacher(Encoder(student), student)
    walk(student, 3, one, 0.5)
    one.save(tmp_path / "teacher.safetensors")
    two = Teacher(Encoder(Student()), student)
    two.load(tmp_path / "teacher.safetensors")
    for name, value in one.module.state_dict().items():
        assert torch.equal(two.module.state_dict()[name], value)
    other = Teacher(Encoder(student).backbone, student.backbone)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load(tmp_path / "teacher.safetensors")
