"""The version of bntool."""

__version__ = "0.1.0"
