#!/usr/bin/env python3
"""Wrote gemma_tokens.json: texts, and the tokens that llama.cpp's server makes of them with Gemma 3's file.

    llama-server -m gemma-3-270m-q4_k_m.gguf --port 18711 & tests/data/gemma_tokens.py 18711 500
"""

import json
import random
import sys
import urllib.request
from pathlib import Path

PARTS = """the|of| and|ing| 1|234|5.678|é|ß|ø|naïve|Ångström|こんにちは|世界|漢字|한국어|русский|العربية|עברית|हिन्दी|ไทย
|🦀|👩‍👩‍👧|🏳️‍🌈|\\u0301|\\u200d|\\u00a0|\\u2028|\\ufeff|▁|▁▁|<|>|</|<b>|</b>|<h1>|<table>|<bos>|<eos>|<pad>|<unused7>|<start_of_turn>
|<end_of_turn>|<0x0A>|<0x|[multimodal]|[|]|{|}|();|fn main()|x += 1|https://example.org/?q=1&r=2|#include|\\t|\\t\\t|\\n|\\n\\n|\\r\\n
| |  |   |       |a|b|aa|aaa|aaaa|ab|aba|.|...|!?|"|'|'s|n't|—|…|“|”|\\\\|/|//|_|__|snake_case|CamelCase|ALLCAPS|i̇|ﬁ|Ⅷ|½|𝔘|𐍈|\\x00|\\x7f
|ꙮ|᠀|㋿|\\ue000|\\U0010ffff|l'été|Straße|don't|1,000,000|0x1F|-3e-7|zzzzzzzzzzzz|qwrtpsdfg|antidisestablishmentarianism""".replace("\n", "")


def main():
    port, count = sys.argv[1:]
    parts = [part.encode().decode("unicode_escape")
             if "\\" in part else part for part in PARTS.split("|")]
    parts = [part for part in parts if part]
    dice = random.Random(3)
    alice = Path(__file__).with_name("alice.txt").read_text()
    texts = parts + [alice[:1500], " " * 40, "\n" * 70, "\t" * 33, "a" * 300, "ab" * 150, " a" * 50, "x" * 7 + " " * 33 + "y"]
    while len(texts) < int(count):
        kind = dice.random()
        if kind < 0.15:
            texts.append("".join(chr(c) for c in (dice.randrange(0x20, 0x3000) for _ in range(dice.randrange(1, 12)))))
        elif kind < 0.2:
            points = (dice.randrange(0x1, 0x110000) for _ in range(dice.randrange(1, 8)))
            texts.append("".join(chr(c) for c in points if not 0xD800 <= c < 0xE000))
        elif kind < 0.35:
            start = dice.randrange(len(alice) - 80)
            texts.append(alice[start : start + dice.randrange(1, 80)])
        else:
            glue = dice.choice(["", "", " ", "  ", "\n"])
            texts.append(glue.join(dice.choice(parts) for _ in range(dice.randrange(2, 12))))
    out = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/tokenize", body, {"Content-Type": "application/json"})
        out.append([text, json.load(urllib.request.urlopen(request))["tokens"]])
    lines = ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in out)
    Path(__file__).with_name("gemma_tokens.json").write_text(f"[\n{lines}\n]\n")


main()
