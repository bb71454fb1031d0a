"""What bntool puts into models, and models moved, cast or frozen."""
