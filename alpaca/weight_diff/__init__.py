"""Makes, recovers and verifies weight diffs by streaming tensors from file to file."""
