"""The paper's whole story at toy size: `python -m demo`, or `make demo`."""
