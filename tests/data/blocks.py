#!/usr/bin/env python3
"""Wrote blocks.bin: stored blocks of every quantised type, and the numbers that they stand for.

The numbers are those of the PyPI package `gguf` (0.19), whose dequantiser in numpy is not ours. For each type,
in the order below: two blocks of random bytes with scales of a usual size, then their numbers as f32, little
endian.

    python3 -m venv venv && venv/bin/pip install gguf==VERSION && venv/bin/python tests/data/blocks.py
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize

# Where each type keeps its half-precision scales.
SCALES = [
    (Type.Q4_0, [0]),
    (Type.Q4_1, [0, 2]),
    (Type.Q5_0, [0]),
    (Type.Q5_1, [0, 2]),
    (Type.Q8_0, [0]),
    (Type.Q4_K, [0, 2]),
    (Type.Q5_K, [0, 2]),
    (Type.Q6_K, [208]),
]

random = np.random.default_rng(20)
out = b""
for ty, scales in SCALES:
    _, size = GGML_QUANT_SIZES[ty]
    blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = random.normal(0, 0.02, 2).astype(np.float16).view(np.uint8).reshape(2, 2)
    out += blocks.tobytes() + dequantize(blocks, ty).astype("<f4").tobytes()
Path(__file__).with_name("blocks.bin").write_bytes(out)
