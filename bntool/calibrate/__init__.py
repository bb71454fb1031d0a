"""Running statistics from data."""
