#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["transformers>=4.51", "tiktoken>=0.7"]
# ///
"""What exact prompts cost: generating a corpus against one batch encoding of the very same prompts.

    benchmarks/generate_speed.py                                     a byte-level BPE trained on the spot
    benchmarks/generate_speed.py --tokenizer-model ./my-model        a tokenizer.json of yours
    benchmarks/generate_speed.py --memory                            resident memory, 1,000 against 100,000 x 512

Encoding each prompt once is the floor: unless it is encoded, nobody knows its length. The generator is timed as
a user runs it, as a process with start-up, tokenizer and file; the floor is `encode_batch` alone in this
process, on as many threads. Both are run in turn, several times; the ratio of the medians is reported.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "generate_requests.py"


def train(directory):
    """A byte-level BPE of 8,000 tokens over made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    words = ["".join(rng.choice("etaoinshrdlucmfw") for _ in range(rng.randint(2, 9))) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((" ".join(rng.choices(words, k=40)) for _ in range(5000)), trainer)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def arguments(model, output, count, tokens, overlap):
    options = ["--count", count, "--approx-input-tokens", tokens, "--prefix-overlap", overlap]
    return [*map(str, options), "--tokenizer-model", str(model), "--output", str(output)]


def generate(command):
    """Seconds, and what the process printed."""
    started = time.perf_counter()
    result = subprocess.run([sys.executable, *command], cwd=SCRIPT.parent, capture_output=True, text=True)
    elapsed = time.perf_counter() - started
    if result.returncode:
        raise SystemExit(result.stderr)
    return elapsed, result.stdout


def corpus(output):
    return next(Path(output).glob("*.jsonl"))


def encoder_of(model):
    """The library's own batch encoding, nothing around it."""
    if Path(model).exists():
        from tokenizers import Tokenizer

        path = Path(model)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    import tiktoken

    encoding = tiktoken.encoding_for_model(model)
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


def speed(model, options):
    encode = encoder_of(model)
    generating, encoding = [], []
    for turn in range(options.repeat):
        with tempfile.TemporaryDirectory() as output:
            asked = arguments(model, output, options.count, options.tokens, options.overlap)
            seconds, _ = generate([str(SCRIPT), *asked])
            with open(corpus(output), encoding="utf-8") as lines:
                texts = [json.loads(line)["text"] for line in lines]
        generating.append(seconds)
        started = time.perf_counter()
        encoded = encode(texts)
        encoding.append(time.perf_counter() - started)
        exact = sum(len(one) == options.tokens for one in encoded)
        print(f"run {turn + 1}: generate {seconds:.2f} s, encode {encoding[-1]:.2f} s, {exact} exact")
    made, floor = statistics.median(generating), statistics.median(encoding)
    print(f"{options.count} x {options.tokens} tokens, overlap {options.overlap}: {made / floor:.2f} times the floor")


def memory(model):
    """Peak resident memory as the process itself sees it (Linux)."""
    probe = (
        "import sys, generate_requests as g; assert g.main(sys.argv[1:]) == 0; "
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    peaks = {}
    for count in (1000, 100_000):
        with tempfile.TemporaryDirectory() as output:
            seconds, printed = generate(["-c", probe, *arguments(model, output, count, 512, 0.3)])
            peaks[count] = int(printed.splitlines()[-1]) / 1024
            size = corpus(output).stat().st_size / 2**20
        print(f"{count:>7} x 512 tokens: {peaks[count]:.0f} MiB at most, {seconds:.1f} s, {size:.0f} MiB written")
    print(f"difference {peaks[100_000] - peaks[1000]:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-model", help="directory, tokenizer.json or OpenAI model (default: train one)")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.tokenizer_model or train(Path(scratch))
        model = Path(model).resolve() if Path(model).exists() else model
        if options.memory:
            memory(model)
        else:
            speed(model, options)


if __name__ == "__main__":
    main()
