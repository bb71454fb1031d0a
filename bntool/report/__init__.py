"""Reports: the model summary, and the tables and counts that every report is made of."""

from __future__ import annotations

from bntool.report.counting import parameter_delta, parameters_of
from bntool.report.summary import Summary, summarize

__all__ = ["Summary", "parameter_delta", "parameters_of", "summarize"]
