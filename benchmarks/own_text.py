"""Text that a model writes from nothing but a start token, to calibrate its quantization with.

Source: self-calibration (Williams et al., arXiv 2410.17170).

    python benchmarks/own_text.py MODEL -o own.txt [--start "<|endoftext|>"]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qserve import LLM, SamplingParams


def main() -> None:
    """Sample texts of one length at temperature 1 and write them one after the other."""
    parser = argparse.ArgumentParser(description="Let a model write its own calibration text.")
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--start", default="<|endoftext|>", help="the token that every text follows"
    )
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    llm = LLM(options.model, kv_bits=16, max_num_sequences=options.texts)
    start = llm.engine.tokenizer.convert_tokens_to_ids(options.start)
    params = SamplingParams(n=options.texts, max_tokens=options.tokens, seed=options.seed)
    (generation,) = llm.generate([[start]], params)
    texts = [completion.text for completion in generation.completions]
    options.output.write_text("\n\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
