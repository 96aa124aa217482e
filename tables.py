"""The paper's tables from a judge's results, with the paper's own numbers beside.

Concept   one row a configuration, one column a question, averages as in the paper. Each of our numbers carries a 95 %
          bootstrap interval over the videos; configurations are compared video by video (the same track and prompt)
          by a paired sign-flip test. A video that failed is a gap: left out of the means and counted in the row.
Paper     arXiv 2503.14505v2, Tables 1-6. Dance quality is the mean of five questions, video quality of three, overall
          of these eight, prompt alignment of the last three.
Differs   the paper gives neither intervals nor tests. Its numbers (published.json, which says where each table was
          read) belong to its own judges, with other videos: a row of ours beside one of the paper compares judges as
          much as models.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import beats
import media
from config import UserError, flag, from_cli, words
from judge import holm, sign_flip_p
from questions import DANCE, PROMPT, VIDEO

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
AVERAGES = {"dance": (*DANCE,), "video": (*VIDEO,), "overall": (*DANCE, *VIDEO), "prompt": (*PROMPT,)}
TITLES = {"dance": "Dance quality average", "video": "Video quality average", "overall": "Overall average",
          "prompt": "Prompt alignment average", "vbench_imaging": "VBench imaging quality",
          "vbench_aesthetic": "VBench aesthetic quality"}  # fmt: skip
VBENCH = ("vbench_imaging", "vbench_aesthetic")
MAIN = (*DANCE, "dance", *VIDEO, "video", "overall")
TABLES = {  # number: title, columns, the configurations it is about (None: all)
    "1": ("adaptation strategies", MAIN, None),
    "2": ("dance quality", (*DANCE, "dance"), None),
    "3": ("video quality", (*VIDEO, "video"), None),
    "4": ("prompt alignment", (*PROMPT, "prompt"), None),
    "5": ("layer selection", MAIN,
          ("ours", "all_layers", "even_layers", "first_layers", "middle_layers", "last_layers")),
    "6": ("ablation", MAIN,
          ("ours", "no_layer_selection", "no_higher_rank", "no_lora", "no_beta_uniform", "feature_addition",
           "no_wild", "no_zero_init")),
}  # fmt: skip
INK, BARS = "#222222", ("#2a7f62", "#8fa8c8", "#e4572e", "#c9a227")


@dataclass(frozen=True)
class TableConfig:
    """The paper's Tables 1-6 from folders that were judged, set beside the paper's own numbers.

    A folder's name is its configuration's; the paper knows ours, all_layers, mochi, ... (published.json)."""

    results: tuple[str, ...] = words(help="folders that were judged, or their judge.json; the first is the reference")
    out: Path = flag(Path("out/table"), help="folder for table.md, table.json and table.png")


def read_result(path: Path) -> tuple[str, dict]:
    """(name of the configuration, what judge.json or vbench.json holds), checked; the folder's name is its name."""
    file = path / "judge.json" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "vbench.json").exists():
        file = path / "vbench.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for name, answers in result["scores"].items():
            for question, score in answers.items():
                if score is not None and not 0 <= float(score) <= 10:
                    raise ValueError(f"{name}, {question}: {score} is no score")
        if lacking := {"expected", "gaps", "judge"} - result.keys():
            raise ValueError(f"without {', '.join(sorted(lacking))}")
    except OSError as error:
        raise UserError(f"{file}: cannot be read; expected the result of evaluate.py judge") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a result of evaluate.py judge ({error})") from error
    extra = file.with_name("vbench.json")
    if file.name == "judge.json" and extra.exists():
        for name, answers in read_result(extra)[1]["scores"].items():
            result["scores"].setdefault(name, {}).update(answers)
    return file.absolute().parent.name, result


def matrix(scores: dict, columns) -> np.ndarray:
    """Scores of the videos (n, questions), nan where there is no answer; `columns` are questions, not averages."""
    rows = [[answers.get(column) for column in columns] for answers in scores.values()]
    return np.array(rows, np.float64).reshape(len(rows), len(columns))  # None becomes nan


def mean_of_means(x: np.ndarray) -> np.ndarray:
    """(..., n, questions) -> (...): the mean over the questions of the mean over the videos that have an answer.

    As in the paper, where averages are those of the columns; nan as long as a question has no answer at all.
    """
    answered = ~np.isnan(x)
    count = answered.sum(axis=-2)
    return (np.where(answered, x, 0).sum(axis=-2) / np.where(count == 0, np.nan, count)).mean(axis=-1)


def cell(scores: dict, column: str, draws: int = 2000) -> dict | None:
    """Mean, 95 % bootstrap interval over the videos, and number of videos with an answer; None if never asked."""
    x = matrix(scores, AVERAGES.get(column, (column,)))
    mean = float(mean_of_means(x)) if len(x) else np.nan
    if np.isnan(mean):
        return None
    picks = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    low, high = np.nanquantile(mean_of_means(x[picks]), [0.025, 0.975])
    return {"mean": mean, "interval": [float(low), float(high)], "videos": int((~np.isnan(x)).any(axis=1).sum())}


def paired(first: dict, second: dict, column: str) -> dict:
    """second - first over the videos that both have, question by question: mean, interval, two-sided P value."""
    shared = [name for name in first if name in second]
    pick = AVERAGES.get(column, (column,))
    d = matrix({n: second[n] for n in shared}, pick) - matrix({n: first[n] for n in shared}, pick)
    d = d[~np.isnan(d).all(axis=1)]
    if len(d) == 0:
        return {"videos": 0}
    d = np.nanmean(d, axis=1)
    interval = beats.bootstrap_interval(d)
    return {"videos": len(d), "difference": float(d.mean()), "interval": interval, "p": sign_flip_p(d, two_sided=True)}


def all_pairs(results: dict[str, dict]) -> list[dict]:
    """Every configuration against the first, on each average, P values corrected by Holm over all these tests."""
    reference, *others = results
    tests = [
        {"reference": reference, "configuration": other, "average": column, **result}
        for other in others
        for column in AVERAGES
        if (result := paired(results[reference]["scores"], results[other]["scores"], column))["videos"]
    ]
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_corrected"] = p
    return tests


# ----------------------------------------------------------------------------------------------------------- output


def title_of(column: str) -> str:
    return TITLES.get(column, column.replace("_", " ").capitalize())


def line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(number: str, results: dict, cells: dict) -> str:
    """One table: a row of ours with intervals and counts, and under it the paper's where it has one."""
    title, columns, names = TABLES[number]
    paper, text = PUBLISHED["tables"][number], [f"## Table {number}: {title}", ""]
    text += [line(["", *map(title_of, columns), "videos"]), "|---" * (len(columns) + 2) + "|"]
    ours = [name for name in results if names is None or name in names]
    for name in [*ours, *(name for name in paper if name not in ours)]:
        if name in ours:
            found = [cells[name].get(column) for column in columns]
            shown = [f"{c['mean']:.2f} [{c['interval'][0]:.2f}, {c['interval'][1]:.2f}]" if c else "-" for c in found]
            text.append(line([f"**{name}**", *shown, f"{len(results[name]['scores'])} of {results[name]['expected']}"]))
        if name in paper:
            shown = [f"{paper[name][column]:.2f}" if column in paper[name] else "" for column in columns]
            text.append(line([f"*paper: {PUBLISHED['names'][name]}*", *shown, "100" if number == "1" else ""]))
    judges = sorted({results[name]["judge"] for name in ours})
    text += ["", f"Judge: {', '.join(judges) or 'no results'}; in the paper {PUBLISHED['judges'][number]}. "
             f"The paper's numbers: {PUBLISHED['where'][number]}."]  # fmt: skip
    return "\n".join(text) + "\n"


def vbench_lines(cells: dict) -> str:
    """VBench's scores of the picture, which need no judge: a row a configuration."""
    text = ["## VBench", "", line(["", *map(title_of, VBENCH), "videos"]), "|---" * (len(VBENCH) + 2) + "|"]
    for name, row in cells.items():
        found = [row[column] for column in VBENCH]
        shown = [f"{c['mean']:.4f} [{c['interval'][0]:.4f}, {c['interval'][1]:.4f}]" if c else "-" for c in found]
        text.append(line([f"**{name}**", *shown, str(max((c["videos"] for c in found if c), default=0))]))
    return "\n".join(text) + "\n"


def notes(results: dict) -> str:
    """Gaps, missing answers and whether the judge hears, a line a configuration."""
    text = ["## Judges, gaps and missing answers", ""]
    text += [line(["", "gaps", "answers missing", "does the judge hear?"]), "|---" * 4 + "|"]
    for name, result in results.items():
        missing = f"{result['missing']} of {result['asked']}" if "asked" in result else "-"
        text.append(line([name, str(len(result["gaps"])), missing, result.get("verdict", "not tested")]))
    text += ["", "Intervals: 95 %, bootstrap over videos. A gap is a video that is missing or broken: never a zero."]
    return "\n".join(text) + "\n"


def test_lines(tests: list[dict]) -> str:
    text = ["## Paired tests", "", "Sign-flip test on the same tracks and prompts; P corrected by Holm.", ""]
    text += [line(["", "against", "average", "difference", "P", "videos"]), "|---" * 6 + "|"]
    for t in tests:
        low, high = t["interval"]
        text.append(line([t["configuration"], t["reference"], title_of(t["average"]),
                          f"{t['difference']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{t['p_corrected']:.4f}",
                          str(t["videos"])]))  # fmt: skip
    return "\n".join(text) + "\n"


def chart(path: Path, results: dict, cells: dict) -> None:
    """Averages of every configuration as bars with intervals; the paper's own as diamonds."""
    from matplotlib.figure import Figure

    shown = [column for column in AVERAGES if any(cells[name].get(column) for name in results)]
    if not shown:
        raise UserError("no configuration has all answers of any average yet, so there is nothing to draw")
    figure = Figure(figsize=(max(6.0, 1.5 + 1.7 * len(results)), 4.6), dpi=140, layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(shown)
    for k, (column, colour) in enumerate(zip(shown, BARS)):
        for i, name in enumerate(results):
            x, c = i + (k - (len(shown) - 1) / 2) * width, cells[name].get(column)
            label = column if i == 0 else None
            if c:
                error = [[max(0.0, c["mean"] - c["interval"][0])], [max(0.0, c["interval"][1] - c["mean"])]]
                axis.bar(x, c["mean"], 0.92 * width, color=colour, label=label)
                axis.errorbar(x, c["mean"], error, color=INK, capsize=3, linewidth=1)
            paper = next((t[name][column] for t in PUBLISHED["tables"].values() if column in t.get(name, {})), None)
            if paper is not None:
                axis.plot(x, paper, "D", color="white", markeredgecolor=INK, markersize=6)
    axis.plot([], [], "D", color="white", markeredgecolor=INK, label="the paper's")
    axis.set(xticks=range(len(results)), ylim=(0, 10.5), ylabel="score of the judge, 0 to 10")
    axis.set_xticklabels(results, rotation=20 if len(results) > 4 else 0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown) + 1, frameon=False)
    with media.new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    cfg = from_cli(TableConfig)
    if not cfg.results:
        raise UserError("table: expected the folders that were judged, e.g. evaluate.py table out/ours out/mochi")
    results = {}
    for path in map(Path, cfg.results):
        name, result = read_result(path)
        if name in results:
            raise UserError(f"{path}: a second configuration called {name}; give the folders different names")
        results[name] = result
    columns = [*MAIN, *PROMPT, "prompt", *VBENCH]
    cells = {name: {c: cell(result["scores"], c) for c in columns} for name, result in results.items()}
    tests = all_pairs(results)
    parts = [markdown(number, results, cells) for number in TABLES]
    if any(cells[name][column] for name in results for column in VBENCH):
        parts.append(vbench_lines(cells))
    parts += [test_lines(tests)] * bool(tests) + [notes(results), PUBLISHED["source"] + "\n"]
    about = {name: {key: r.get(key) for key in ("judge", "expected", "gaps", "asked", "missing", "hears", "verdict")}
             for name, r in results.items()}  # fmt: skip
    data = {"configurations": about, "cells": cells, "tests": tests, "published": PUBLISHED}
    chart(cfg.out / "table.png", results, cells)
    for name, text in (("table.md", "\n".join(parts)), ("table.json", json.dumps(data, indent=1))):
        with media.new_file(cfg.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print("\n".join(parts))
    print(f"wrote      {cfg.out}/table.md, table.json, table.png")
