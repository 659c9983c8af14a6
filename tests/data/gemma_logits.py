#!/usr/bin/env python3
"""Wrote gemma_logits.json: what llama.cpp predicts with Gemma 3's file after each token of the second half of
1,024, all of which are further from the text's beginning than a sliding window reaches. It computes in f32 with
the very numbers that the file's blocks stand for.

    cat alice.txt alice.txt >text
    llama-quantize --allow-requantize gemma-3-270m-q4_k_m.gguf gemma-f32.gguf F32
    llama-perplexity -m gemma-f32.gguf -f text -c 1024 -b 1024 --chunks 1 -fa off \\
        --cache-type-k f32 --cache-type-v f32 --kl-divergence-base logits
    gemma_logits.py logits
"""

import json
import sys
from pathlib import Path

import numpy as np

data = Path(sys.argv[1]).read_bytes()
assert data[:8] == b"_logits_"
context, vocabulary, chunks = np.frombuffer(data, "<i4", 3, 8)
tokens = np.frombuffer(data, "<i4", context * chunks, 20)
first, row = int(context) // 2, (int(vocabulary) + 1) // 2 * 2 + 4
rows = np.frombuffer(data, "<u2", offset=20 + 4 * int(context * chunks)).reshape(-1, row)
assert chunks == 1 and len(rows) == context - 1 - first
scales = rows[:, :4].copy().view("<f4")
best = [int(row.argmax()) for row in rows[:, 4:]]
following = tokens[first + 1 : context]
chosen = [float(s * row[t] + low) for (s, low), row, t in zip(scales, rows[:, 4:], following)]
out = dict(first=first, tokens=tokens.tolist(), best=best, log_probabilities=[round(x, 4) for x in chosen])
Path(__file__).with_name("gemma_logits.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
print(len(best), "positions, perplexity", np.exp(-np.mean(chosen)))
