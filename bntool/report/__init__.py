"""Reports from the documents that the commands write: HTML, Markdown, single figures. No torch."""

from __future__ import annotations
