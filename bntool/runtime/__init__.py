"""Runners: one way to run a model, whatever executes it."""
