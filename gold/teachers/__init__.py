"""Teachers: whatever can say how likely it finds a completion, token by token of its own."""

from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher
from gold.teachers.served import ServedTeacher

__all__ = ["LocalTeacher", "ServedTeacher", "Teacher"]
