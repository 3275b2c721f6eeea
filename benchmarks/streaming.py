"""Memory and time of tokenizing a text file of any size and of training batches drawn from it.

    python benchmarks/streaming.py --megabytes 64 512 --workers 2

For each size: writes a JSONL file of random words, tokenizes it into the cache in one fresh
process, and draws packed batches from it in another. Prints each one's peak of memory of its own
(anonymous pages: what mapped files take can be dropped by the system at any time), tokens/s of
tokenizing, and batches/s in the random order of training. `--json FILE` keeps them with the
machine's description.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROW_TOKENS = 2_048
BATCHES = 500
PHASES = ("tokenize", "read")


def write_corpus(path: Path, megabytes: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 8)) for i in range(2_000)]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 2**20:
            text = " ".join(draw.choices(words, k=draw.randint(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")


class PeakMemory:
    """The most anonymous memory that this process held, in MiB, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = 0.0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, anonymous_mib())

    def stop(self) -> float:
        self.done.set()
        self.thread.join()
        return self.peak


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon; this benchmark needs Linux")


def run_phase(phase: str, directory: Path, workers: int) -> dict[str, Any]:
    """In a process of its own."""
    import torch  # noqa: F401  # counted before, not as memory of the data

    from ssm_train.data import DataSettings
    from ssm_train.data.batches import pack
    from ssm_train.data.order import PackedOrder
    from ssm_train.data.sources import load_task_data
    from ssm_train.data.vocabulary import build_tokenizer

    settings = DataSettings(
        data=str(directory),
        cache_dir=str(directory / "cache"),
        packing=True,
        tokens_per_batch=ROW_TOKENS,
        num_data_workers=workers,
    )
    with (directory / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(200)]
    tokenizer = build_tokenizer(texts, {"type": "bpe", "vocab_size": 1_000})
    before, peak, begun = anonymous_mib(), PeakMemory(), time.perf_counter()
    data = load_task_data(settings, tokenizer, "train")
    loaded = time.perf_counter() - begun
    found: dict[str, Any] = {"examples": len(data), "tokens": int(data.lengths.sum())}
    if phase == "read":
        order = PackedOrder(data.lengths, ROW_TOKENS)
        order.micro_batches(0)  # plans the epoch
        begun = time.perf_counter()
        for step in range(min(BATCHES, order.steps_per_epoch)):
            for row in order.micro_batches(step):
                pack(data, row, ROW_TOKENS)
        found["batches_per_second"] = (step + 1) / (time.perf_counter() - begun)
    return found | {"seconds_to_load": loaded, "own_memory_mib": peak.stop() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(run_phase(arguments.phase, arguments.directory, arguments.workers)))
        return
    rows = []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as name:
            write_corpus(Path(name) / "train.jsonl", megabytes)
            for phase in PHASES:
                command = [sys.executable, __file__, "--phase", phase, "--directory", name]
                command += ["--workers", str(arguments.workers)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"megabytes": megabytes, "phase": phase, **json.loads(output)})
                print(
                    "  ".join(f"{k} {v:,.5g}" if k != "phase" else v for k, v in rows[-1].items())
                )
    if arguments.json:
        from ssm_train.record.environment import describe_environment

        text = json.dumps({"rows": rows, "machine": describe_environment()}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
