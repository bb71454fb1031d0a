"""Front ends that build the neutral graph."""
