"""How long a run with very many short records takes to its first step, and what it holds.

    python benchmarks/many_records.py --records 10_000_000 --out many_records.json

Trains a tiny base on some records, writes a JSONL file with all of them, then starts a whole run
from that base with packing three times: the first one tokenizes, the others find the tokens in the
cache; the last one has two processes. Prints for each
the seconds from its start to the end of its first optimizer step, and the most memory of its own
(anonymous pages) that any of its processes held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEW = """\
new_model: {model_type: mamba, hidden_size: 16, num_hidden_layers: 1, state_size: 4}
tokenizer: {type: word}
"""
CONFIG = """\
task: {type: generation, prompt: "{question} =>", label: "{answer}"}
prec: fp32
device: cpu
packing: true
tokens_per_batch: 1024
max_steps: 1
logging_steps: 1
skip_eval: true
no_save: true
learning_rate: 1e-3
overwrite: true
"""
STARTS = {"tokenizes": 1, "cached": 1, "cached, two processes": 2}


def write_records(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=3 + i % 5)) for i in range(1_000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(draw.choices(words, k=4))
            file.write(f'{{"question": "{text}", "answer": "{words[i % 1000]}"}}\n')


def own_memory(pid: int) -> float:
    """MiB of anonymous pages; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) / 1024 if found else 0.0


def family(pid: int) -> list[int]:
    """A process and those below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(found for child in below for found in family(int(child)))]


def write_config(directory: Path, name: str, data: str, more: str) -> None:
    places = f"data: {directory / data}.jsonl\noutput_root: {directory / 'output'}\n"
    (directory / f"{name}.yaml").write_text(CONFIG + places + more)


def start(directory: Path, name: str, data: str, processes: int) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ssm_train.train"]
    variables = {"ACCELERATE_USE_CPU": "true", "SSM_TRAIN_CACHE": str(directory / "cache")}
    rows = directory / "output" / f"{data}_seed42" / name / "metrics.jsonl"
    rows.unlink(missing_ok=True)
    begun, first_step, most = time.monotonic(), 0.0, 0.0
    with (directory / "log.txt").open("w") as log:
        run = subprocess.Popen(
            [*command, "--cfg", str(directory / f"{name}.yaml")],
            env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while run.poll() is None:
            most = max([most, *map(own_memory, family(run.pid))])
            if not first_step and rows.exists() and rows.stat().st_size:
                first_step = time.monotonic() - begun
            time.sleep(0.02)
    if run.returncode:
        raise SystemExit((directory / "log.txt").read_text())
    return {"seconds_to_first_step": first_step, "own_memory_mib": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenize")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_records(directory / "few.jsonl", 10_000)
        write_config(directory, "base", "few", NEW)
        start(directory, "base", "few", 1)
        base = directory / "output" / "few_seed42" / "base" / "model"
        write_records(directory / "many.jsonl", arguments.records)
        more = f"model: {base}\nnum_data_workers: {arguments.workers}\n"
        write_config(directory, "run", "many", more)
        for case, processes in STARTS.items():
            found.append({"start": case, **start(directory, "run", "many", processes)})
            print("  ".join(f"{k} {v:,.5g}" if k != "start" else v for k, v in found[-1].items()))
    if arguments.out:
        from ssm_train.record import describe_environment

        text = json.dumps(
            {"records": arguments.records, "rows": found, "machine": describe_environment()},
            indent=2,
        )
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
