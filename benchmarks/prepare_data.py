"""Measure data_tools/prepare_data.py: speed against sentencepiece alone, and memory by input size.

    python benchmarks/prepare_data.py -i text.jsonl.gz --vocab spm.model --megabytes 50 1000

The input is repeated to each size. Speed is tokens per second of the whole command, from start to
exit, over what SentencePieceProcessor.encode reaches on texts in memory, on the same cores, before
and after. Memory is the largest sum of the resident sizes of the command's processes, which counts
what they share once for each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import psutil
from sentencepiece import SentencePieceProcessor

from ds_deberta.metrics import processor

DATA_TOOLS = Path(__file__).resolve().parents[1] / "data_tools"
sys.path.insert(0, str(DATA_TOOLS))
from inputs import find_files  # noqa: E402
from sources import read_texts  # noqa: E402

CORES = len(os.sched_getaffinity(0))
BASELINE_SECONDS = 10


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-i", "--input", required=True, help="a file that can be repeated")
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 1000], help="of text")
    args = parser.parse_args()
    files = find_files([args.input]).files
    texts = list(islice(read_texts(files, text_field="text"), 20_000))
    size = sum(len(text.encode()) for text in read_texts(files, text_field="text"))
    print(f"`python benchmarks/prepare_data.py`: {processor()}, ", end="")
    print(f"sentencepiece {version('sentencepiece')}\n")
    print("| text | tokens/s | sentencepiece alone | ratio | by CPU time | peak memory |")
    print("|-|-|-|-|-|-|", flush=True)
    encode_alone(texts, args.vocab, seconds=2)  # warm up
    peaks: list[float] = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder, files[0].name)
            with corpus.open("wb") as out:
                for _ in range(-(-megabytes * 10**6 // size)):
                    out.write(files[0].read_bytes())
            before = encode_alone(texts, args.vocab)
            speed, cpu_speed, peak = run_prepare(corpus, args.vocab, Path(folder, "data"))
            after = encode_alone(texts, args.vocab)
        alone, cpu_alone = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
        print(
            f"| {megabytes:,} MB | {speed:,.0f} | {alone:,.0f} | {speed / alone:.2f} "
            f"| {cpu_speed / cpu_alone:.2f} | {peak / 1e6:,.0f} MB |",
            flush=True,
        )
        peaks.append(peak)
    print(f"\nPeak memory, largest input over smallest: {peaks[-1] / peaks[0]:.2f}")


def encode_alone(
    texts: list[str], vocab: str, seconds: float = BASELINE_SECONDS
) -> tuple[float, float]:
    """Return tokens per second, and per second of CPU time, of sentencepiece on all cores."""
    alone = SentencePieceProcessor(model_file=vocab)
    tokens, wall, cpu = 0, 0.0, 0.0
    for batch in batches(texts):
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens += sum(map(len, alone.encode(batch, num_threads=CORES)))
        wall += time.perf_counter() - started
        cpu += time.process_time() - cpu_started
        if wall > seconds:
            break
    return tokens / wall, tokens / cpu


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Yield texts for ever, always new ones: a str keeps the UTF-8 form it once was asked for."""
    while True:
        for start in range(0, len(texts), 1000):
            yield [text.encode().decode() for text in texts[start : start + 1000]]


def run_prepare(corpus: Path, vocab: str, data: Path) -> tuple[float, float, float]:
    """Return tokens per second, tokens per second of CPU time, and the peak memory in bytes."""
    command = [sys.executable, DATA_TOOLS / "prepare_data.py", "-i", corpus, "-o", data]
    started, cpu, peak = time.perf_counter(), {}, 0
    process = psutil.Popen([*map(str, command), "--vocab", vocab], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        resident = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                times = each.cpu_times()
                cpu[each.pid] = times.user + times.system
                resident += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, resident)
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"prepare_data.py failed with exit code {process.returncode}")
    splits = json.loads((data / "manifest.json").read_text())["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    return tokens / seconds, tokens / sum(cpu.values()), peak


if __name__ == "__main__":
    main()
