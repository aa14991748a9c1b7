"""How far a way of running a model is from its float32 output, and how fast it is: `ernie45 verify`."""

from ernie45.verify.agreement import Agreement
from ernie45.verify.report import PromptRow, Report
from ernie45.verify.speed import Speed
from ernie45.verify.verification import verify

__all__ = ["Agreement", "PromptRow", "Report", "Speed", "verify"]
