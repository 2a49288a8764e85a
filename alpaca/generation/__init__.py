"""Instruction data from seed tasks: reading answers, de-duplication, requests in flight, costs and files."""
