"""How fast, and how much memory: as JSON with the machine and the versions it was measured on.

Concept   python bench.py gpu [--rows dit,train,...]       the networks at full size on one card, beside diffusers
          python bench.py cpu [--rows pass,decode,...]    beside diffusers and transformers on a CPU
          python bench.py data --data DIR --weights DIR    encoding and drawing of training clips
          Each has a --help. What each measures is imported when it is asked for.
Paper     none.
"""

import json
import sys
from pathlib import Path

from config import UserError, from_cli, run


def data(argv: list[str]) -> Path:
    from bench_data import DataBench, bench_data

    cfg = from_cli(DataBench, argv)
    result = bench_data(cfg)
    text = json.dumps(result, indent=1) + "\n"
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    cfg.out.write_text(text, encoding="utf-8")
    print(text)
    return cfg.out


def gpu(argv: list[str]) -> Path:
    from bench_gpu import GpuBench, bench_gpu

    cfg = from_cli(GpuBench, argv)
    bench_gpu(cfg)
    return cfg.out


def cpu(argv: list[str]) -> Path:
    from bench_cpu import CpuBench, bench_cpu, table

    cfg = from_cli(CpuBench, argv)
    print(table(bench_cpu(cfg)))
    return cfg.out


COMMANDS = {"gpu": gpu, "cpu": cpu, "data": data}


def main() -> None:
    if sys.argv[1:2] == [] or sys.argv[1] not in COMMANDS:
        raise UserError(f"bench.py {' '.join(sys.argv[1:2])}: expected what to measure: {' or '.join(COMMANDS)}")
    print(COMMANDS[sys.argv[1]](sys.argv[2:]))


if __name__ == "__main__":
    run(main)
