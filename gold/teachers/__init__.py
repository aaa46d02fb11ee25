"""Teachers: models that score completions token by token, in their own tokenization."""

from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import CachedTeacher
from gold.teachers.ema import SelfTeacher
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher
from gold.teachers.served import ServedTeacher
from gold.teachers.several import Teachers

__all__ = [
    "AbsentTeacher",
    "CachedTeacher",
    "LocalTeacher",
    "SelfTeacher",
    "ServedTeacher",
    "Teacher",
    "Teachers",
]
