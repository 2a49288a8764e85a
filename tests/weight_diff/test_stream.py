"""Windows are converted as torch converts, and digests are what their docstrings say."""

import numpy as np
import torch
from weight_diff_pairs import DTYPES

from alpaca.weight_diff import stream
from alpaca.weight_diff.checkpoint_files import SAFETENSORS_DTYPES, STORED


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    kind, n = SAFETENSORS_DTYPES[dtype], len(values)
    return stream.from_float32(values, kind, np.empty(n, STORED[kind]), np.empty(n, np.uint32))


def test_rounding_and_its_reverse_are_torchs_to_the_bit():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    bits[:65536] = np.arange(65536, dtype=np.uint32) << 16 | 0x8000  # every tie of bfloat16
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    for name, dtype in DTYPES.items():
        with np.errstate(over="ignore"):
            found = rounded(values, name).view(np.uint8)
        wanted = torch.from_numpy(values).to(dtype)
        assert np.array_equal(found, wanted.view(torch.uint8).numpy())
        back = stream.as_float32(found.view(STORED[SAFETENSORS_DTYPES[name]]), SAFETENSORS_DTYPES[name], values.copy())
        assert np.array_equal(back, wanted.float().numpy())


def test_bfloat16_ties_go_to_the_even_neighbour():
    assert rounded(np.array([1.00390625, 1.01171875], np.float32), "bfloat16").tolist() == [0x3F80, 0x3F82]


def test_a_checksum_is_the_sum_of_64_bit_words():
    checksum = stream.Checksum()
    checksum.update(np.array([1.0, 2.0], np.float32))
    checksum.update(np.array([3.0], np.float32))
    assert checksum.hexdigest() == "400000007fc00000"


def test_windows_cover_a_tensor():
    assert list(stream.windows(150_000)) == [(0, 65536), (65536, 131072), (131072, 150000)]


def test_jobs_return_in_the_order_of_their_sizes_and_an_error_stops_all():
    assert list(stream.run_jobs("t", {"a": 1, "b": 9, "c": 5}, lambda name, count: count.add(1) or name)) == list("abc")
    started = []

    def job(name, count):
        started.append(name)
        if name == 999:
            raise ZeroDivisionError
        while True:
            count.add(1)

    try:
        stream.run_jobs("t", {n: n for n in range(1000)}, job)
    except ZeroDivisionError:
        assert len(started) <= stream.THREADS + 1
    else:
        raise AssertionError("the error was lost")
