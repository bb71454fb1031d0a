"""Insert BatchNorm in the user's own Python: edits of a source file, and the proof that they are right."""
