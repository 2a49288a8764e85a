"""The whole pipeline at toy size: `make demo`, or `python -m demo` in an environment that has requirements.txt."""
