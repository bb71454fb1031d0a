"""Where data comes from, and how it is cut into batches."""
