"""The dataflow graph that every front end builds, affine maps over it, and example inputs."""
