"""Measures a run's speed: tokens per second, and the share of the hardware's peak that they use (MFU)."""

import contextlib
import resource
import sys
import time

from alpaca.training.memory import ModelShape

# Dense matmul peaks in FLOP/s from the manufacturers' data sheets: bfloat16 with float32 accumulation.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device) -> tuple[float, str]:
    """Finds the FLOP/s that a device can reach in matmuls.

    Returns:
        The figure, and its source: the data sheet, or a matmul timed here.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_BF16.items():
            if part in name:
                return peak, f"{name}'s data sheet, bfloat16"
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "a float32 matmul timed here"


class Throughput:
    """Counts tokens and time.

    `tokens` are all computed positions, padding included; `useful` ones belong to examples. MFU is the share of the
    devices' peak that the arithmetic of useful tokens amounts to: 6 FLOPs per parameter and token (4 for frozen
    weights) and 6 * layers * hidden * length^2 per causal sequence (PaLM, appendix B, halved for causality). Hardware
    MFU counts what was computed instead: padding and recomputed layers, shared prefixes once, and only the logits that
    were needed (attention as before, so that of padding is left out).
    """

    def __init__(self, shape: ModelShape, device, world: int, recomputes: bool = False):
        """Starts counting for a model on `world` devices like `device`; `recomputes` means gradient checkpointing."""
        self.shape, self.device, self.world, self.recomputes = shape, device, world, recomputes
        self.peak, self.peak_source = peak_flops(device)
        self.total = {"tokens": 0.0, "useful": 0.0, "flops": 0.0, "executed": 0.0, "seconds": 0.0}
        self.restart()

    def restart(self) -> None:
        """Drops what was counted since the last report."""
        self.tokens = self.logits = 0
        self.useful = self.squares = 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Stops the clock for an evaluation or a save."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, computed: int, logits: int, lengths) -> None:
        """Counts a pass.

        Args:
            computed: Positions computed, padding included.
            logits: Positions whose logits were computed.
            lengths: True lengths of its sequences, an int64 tensor on any device.
        """
        self.tokens += computed
        self.logits += logits
        self.useful = self.useful + lengths.sum()
        self.squares = self.squares + (lengths**2).sum()

    def report(self, gather) -> dict[str, float]:
        """Sums up what was counted since the last report.

        Args:
            gather: Sums a float64 tensor over all ranks.

        Returns:
            The figures of the log line.
        """
        import torch

        counts = (self.tokens, self.logits, self.useful, self.squares)
        counts = torch.stack([torch.as_tensor(x).cpu().double() for x in counts])
        tokens, logits, useful, squares = gather(counts).tolist()
        seconds = time.perf_counter() - self.since
        frozen = self.shape.parameters - self.shape.trainable
        attention = 6 * self.shape.layers * self.shape.hidden * squares
        head = self.shape.vocabulary * self.shape.hidden
        body = self.shape.matmul_parameters - head
        flops = (6 * (body + head) - 2 * frozen) * useful + attention
        passes = 4 / 3 if self.recomputes else 1  # the forward pass, a third of the work, runs twice
        executed = ((6 * body - 2 * frozen) * tokens + attention) * passes + 6 * head * logits
        for name, value in zip(self.total, (tokens, useful, flops, executed, seconds), strict=True):
            self.total[name] += value
        self.restart()
        return self._rates(tokens, useful, flops, executed, seconds)

    def summary(self) -> dict[str, float]:
        """Sums up all reports."""
        return self._rates(*self.total.values())

    def _rates(self, tokens: float, useful: float, flops: float, executed: float, seconds: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "useful_tokens_per_s": round(useful / seconds, 1),
            "mfu": round(flops / seconds / (self.world * self.peak), 4),
            "hardware_mfu": round(executed / seconds / (self.world * self.peak), 4),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }


def peak_memory(device) -> int:
    """Gets the peak memory of this process in bytes: the device's, or on a CPU the host's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_table(state, throughput: Throughput) -> str:
    """Formats a summary of a run.

    Args:
        state: The Trainer's state.
        throughput: What it counted.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    rates, total = throughput.summary(), throughput.total
    rows = [
        ("steps", f"{state.global_step:,}"),
        ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "-"),
        ("time", f"{total['seconds']:,.1f} s, without evaluations and saves"),
        ("tokens", f"{total['tokens']:,.0f} computed, {total['useful']:,.0f} useful (without padding)"),
        ("tokens/s", f"{rates['tokens_per_s']:,} computed, {rates['useful_tokens_per_s']:,} useful"),
        ("MFU", f"{rates['mfu']:.1%}, of the hardware's work {rates['hardware_mfu']:.1%}"),
        ("peak", f"{throughput.peak / 1e12:,.2f} TFLOP/s per device ({throughput.peak_source})"),
        ("peak memory", f"{rates['peak_memory_gib']} GiB in this process"),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)
