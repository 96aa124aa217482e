"""The paper's claims measured on the toy world, where truth is known: one command, one table.

Concept   each claim is a function in claims_music.py, claims_look.py or claims_table.py that returns rows: a value, its
          95 % interval, its level of chance, its ceiling. A claim is written as soon as it is measured and is not
          measured again; one that fails does not stop the others.
Paper     arXiv 2503.14505v2, Sec. 4 and 5; its judge is a video LLM, ours is arithmetic on pixels.
"""

import dataclasses
import json
import shlex
import sys
import time
import traceback
from pathlib import Path

import torch

import media
from claims_look import difficulty, diversity, groups, prompt, unseen
from claims_music import listens, longer, speed, unheard
from claims_score import HEADER, Row, line
from claims_studio import ClaimsConfig, Dancer, Studio, find_dancers
from claims_table import Incomplete, depth_of, layers, table1, table4
from config import UserError, from_cli, make_folder, run
from data_encode import fingerprint_weights, hash_of
from train import choose_layers

CLAIMS = {
    "listens": listens, "speed": speed, "longer": longer, "unheard": unheard, "prompt": prompt, "unseen": unseen,
    "groups": groups, "difficulty": difficulty, "diversity": diversity, "layers": layers, "table1": table1,
    "table4": table4,
}  # fmt: skip
NEED_DATA = ("layers", "table1", "table4")
ELSEWHERE = {"names", "out", "jobs", "batch", "device"}  # flags that do not change what is measured
TABLES_ONLY = {"data", "wild", "layers", "seeds", "train_steps", "train_batch"}


def foreign_to(name: str) -> set[str]:
    """Flags that other claims need and this one does not."""
    return (set() if name in NEED_DATA else TABLES_ONLY) | (set() if name == "unheard" else {"music"})


def identity_of(cfg: ClaimsConfig, name: str, dancers: list[Dancer]) -> str:
    """Changes when a result must be measured again."""
    unused = ELSEWHERE | foreign_to(name)
    flags = {key: str(value) for key, value in dataclasses.asdict(cfg).items() if key not in unused}
    weights = sorted(file for file in cfg.weights.rglob("*.safetensors") if file.name != "musicinfuser.safetensors")
    paths = weights + [dancer.adapter for dancer in dancers]
    return hash_of(name, flags, [fingerprint_weights(path) for path in paths])


def command_of(cfg: ClaimsConfig, name: str) -> str:
    """The command that measures this claim alone."""
    parts = ["python", "claims.py", name]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in {"names", "out", "jobs"} | foreign_to(name) and value != field.default:
            parts += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(parts)


def finished(path: Path, identity: str) -> dict | None:
    """The result in the file, if it is whole and of the same identity."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("identity") == identity and not result.get("failed") else None


def markdown(result: dict) -> str:
    """One claim as a section with its table."""
    about = f"`{result['command']}`, {result['seconds']:.0f} s on {result['device']}"
    why = [f"\nIncomplete: {result['failed']}\n"] if result.get("failed") else []
    rows = [line(Row(**row)) for row in result["rows"]]
    about_it = " ".join(CLAIMS[result["claim"]].__doc__.split())
    return "\n".join([f"## {result['claim']}", "", about_it, "", about, *why, "", HEADER, *rows, ""])


def write(path: Path, text: str) -> None:
    with media.new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def measure(cfg: ClaimsConfig, studio: Studio, name: str, dancers: list[Dancer], identity: str) -> dict:
    """Measure one claim; an exception becomes its entry `failed`."""
    began, failed, rows = time.perf_counter(), None, []
    try:
        rows = CLAIMS[name](studio, dancers)
    except Incomplete as error:
        rows, failed = error.rows, str(error)
    except Exception as error:  # whatever it is, the other claims are still to be measured
        failed = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    device = torch.cuda.get_device_name(studio.device) if studio.device.type == "cuda" else studio.device.type
    return {
        "claim": name,
        "command": command_of(cfg, name),
        "clips": cfg.clips,
        "seconds": time.perf_counter() - began,
        "device": device,
        "torch": torch.__version__,
        "identity": identity,
        "failed": failed,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def main() -> None:
    cfg = from_cli(ClaimsConfig)
    unknown = [name for name in cfg.names if name not in CLAIMS]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such claim; expected {', '.join(CLAIMS)}")
    if cfg.data is None and set(NEED_DATA) & set(cfg.names):
        raise UserError(f"{', '.join(NEED_DATA)} train adapters: give --data (and --wild)")
    if "layers" in cfg.names and cfg.layers is None:
        raise UserError("`layers` compares the most adaptable layers with others: give --layers, from layer_select.py")
    for name in ("weights", "data", "wild", "music"):
        if (folder := getattr(cfg, name)) and not folder.is_dir():
            raise UserError(f"--{name} {folder}: no such folder")
    if cfg.layers is not None:
        choose_layers(str(cfg.layers), depth_of(cfg))  # a file that is no good is refused before anything is measured
    unable = set() if cfg.data else set(NEED_DATA)
    if cfg.layers is None:
        unable.add("layers")
    names = cfg.names or [name for name in CLAIMS if name not in unable]
    dancers, studio = find_dancers(cfg), Studio(cfg)
    results = []
    make_folder(cfg.out, "--out")
    try:
        for name in names:
            path, identity = cfg.out / f"{name}.json", identity_of(cfg, name, dancers)
            result = finished(path, identity)
            if result is None:
                print(f"{name} ...", file=sys.stderr, flush=True)
                result = measure(cfg, studio, name, dancers, identity)
                write(path, json.dumps(result, indent=1))
            print(markdown(result), flush=True)
            results.append(result)
            write(cfg.out / "claims.md", "\n".join(map(markdown, results)))
    except OSError as error:
        raise UserError(f"{cfg.out} cannot be written: {error.strerror or error}") from error
    finally:
        studio.close()
    print(f"wrote {cfg.out / 'claims.md'}")
    if failed := [result["claim"] for result in results if result["failed"]]:
        print(f"not measured as a whole: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
