"""Padding-free training: layout of a step, the forward pass that computes it, and its trainer."""
