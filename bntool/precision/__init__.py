"""Models cast to another type, or moved by their own rounding."""
