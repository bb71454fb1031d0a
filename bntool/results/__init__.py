"""Reports: the model summary, and the tables and counts that every report is made of."""

from __future__ import annotations

from bntool.results.counting import parameter_delta, parameters_of
from bntool.results.summary import Summary, summarize

__all__ = ["Summary", "parameter_delta", "parameters_of", "summarize"]
