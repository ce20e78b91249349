"""What works: every method on every timm module and every RobustBench corruption model.

    python examples/coverage.py --out examples/results/coverage.json --report examples/COVERAGE.md

For each timm module the smallest entrypoint is built, for each architecture of RobustBench's
corruptions zoo its own constructor is called, both with random weights. Checked is whether the
model can be wrapped, one step moves what the adapter names and nothing else, logits are finite, a
step size of zero gives the plain model, and a reset is exact. ``--resume`` continues where a run
stopped; ``--models``, ``--modules``, ``--methods`` and ``--limit`` select what is checked.
COVERAGE-NEWEST-TIMM.md has the modules that a newer timm than RobustBench's adds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

import ttt_plugins as tp
from ttt_plugins.backbones.backbone import Backbone
from ttt_plugins.backbones.norms import norm_parameters
from ttt_plugins.backbones.stages import classifier_names
from ttt_plugins.core.heads import init_byol, init_rotation
from ttt_plugins.core.registry import get_method
from ttt_plugins.core.views import image_keys
from ttt_plugins.utils.robustbench import import_robustbench, version

CLASSES = 10
SIZES = (64, 96, 128, 160, 192, 224, 256)
_EVERY_BATCH = {"window": 1, "statistics": "batch", "guard": False}
#: SAR without its filter, few views per image, and small steps where all weights of a random
#: network adapt.
FIELDS = {
    "tent": _EVERY_BATCH,
    "sar": {"lr": 1e-1, "margin": 1.0, "recovery": 0.0} | _EVERY_BATCH,
    "mgg": _EVERY_BATCH,
    "ttt": {"lr": 1e-6, "steps": 1, "copies": 1, "chunk_size": 2},
    "mt3": {"lr": 1e-6, "copies": 1, "chunk_size": 2},
}
#: Largest number of copies of the weights that exist at the same time in a row.
_COPIES = 8


class _HostSchedules(TorchFunctionMode):
    """Keeps ``torch.linspace`` on the CPU, because constructors read drop-path rates from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _without_memory(build) -> nn.Module:
    """A model on the meta device, or on the CPU if its constructor computes with values."""
    try:
        with torch.device("meta"), _HostSchedules():
            return build()
    except (NotImplementedError, RuntimeError, TypeError):
        return build()


# -- which models ------------------------------------------------------------------------------


def smallest_entrypoints(modules: list[str] | None = None) -> dict[str, str]:
    """The entrypoint with the fewest parameters by timm module, the smallest first.

    Parameters are counted without allocating memory for them. All modules, or those named.
    """
    found, least = {}, {}
    for module in tqdm(modules or timm.list_modules(), "smallest entrypoints"):
        sizes = {}
        for name in timm.list_models(module=module):
            if timm.model_entrypoint(name).__module__.startswith("timm."):
                model = _without_memory(lambda name=name: timm.create_model(name))
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            found[module] = min(sizes, key=sizes.get)
            least[module] = sizes[found[module]]
    return {module: found[module] for module in sorted(found, key=least.get)}


def _zoo() -> dict[str, dict]:
    """RobustBench's entries by ``robustbench:<dataset>/<name>``."""
    zoo = import_robustbench().model_zoo
    enums = zoo.enums
    return {
        f"robustbench:{dataset}/{name}": entry
        for dataset in ("cifar10", "cifar100", "imagenet")
        for name, entry in zoo.model_dicts[enums.BenchmarkDataset(dataset)][
            enums.ThreatModel.corruptions
        ].items()
    }


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    """Give random weights to the few zoo constructors that ask for pretrained ones."""
    from torchvision import models

    create, resnet50 = timm.create_model, models.resnet50
    with (
        mock.patch.object(timm, "create_model", side_effect=lambda name, **_: create(name)),
        mock.patch.object(models, "resnet50", side_effect=lambda **_: resnet50()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _zoo_model(name: str) -> nn.Module:
    entry = _zoo()[name]
    dataset, _, plain = name.removeprefix("robustbench:").partition("/")
    # RobustBench's own load_model looks for this name first.
    registered = f"{plain.lower().replace('-', '_')}_{dataset}_corruptions"
    with _no_downloads():
        return timm.create_model(registered) if timm.is_model(registered) else entry["model"]()


def architectures() -> dict[str, str]:
    """For each RobustBench entry, the first with the same architecture apart from the classes."""
    first: dict[str, str] = {}
    found = {}
    for name in tqdm(_zoo(), "RobustBench architectures"):
        try:
            model = _without_memory(lambda name=name: _zoo_model(name))
            heads = tuple(f"{n}." for n in classifier_names(model))
        except Exception:  # the entry's row will say why
            found[name] = name
            continue
        shapes = [
            (n, type(model).__name__, tuple(p.shape[n.startswith(heads) :]))
            for n, p in model.named_parameters()
        ]
        kinds = sorted({type(m).__name__ for m in model.modules()})
        digest = hashlib.sha256(repr((shapes, kinds)).encode()).hexdigest()
        found[name] = first.setdefault(digest, name)
    return found


# -- a model with weights on which everything shows ----------------------------------------------


def build(name: str, seed: int = 0) -> nn.Module:
    """A model with random weights by name; timm's have ten classes."""
    torch.manual_seed(seed)
    if name.startswith("robustbench:"):
        return _zoo_model(name)
    return timm.create_model(name, num_classes=CLASSES)


def prepare(model: nn.Module, name: str = "", seed: int = 0) -> Tensor:
    """Give a random model weights that hide no errors; return two images of a size it accepts.

    No weight keeps a trivial value: constant parameters get noise, running statistics are those
    of a few images, and the classifier is scaled to logits of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    images = _fitting_images(model.eval(), name, generator)
    backbone = _backbone(model, name)
    seen = _shown(images)
    seen = (seen - backbone.mean) / backbone.std if backbone.normalize else seen
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for m in norms:
            m.train()
            m.momentum = 1.0
        if norms:
            model(seen)
        model.eval()
        spread = model(seen).std().clamp_min(1e-6)
        for head in classifier_names(model):
            for p in model.get_submodule(head).parameters():
                p.div_(spread)
    return images[:2]


def _shown(images: Tensor) -> Tensor:
    """Images as TTT's and MT3's tasks use them: also rotated, and with a black border."""
    cropped = images.rot90(1, (2, 3)).clone()
    cropped[0::2, :, : images.shape[2] // 8] = 0
    cropped[1::2, ..., : images.shape[3] // 8] = 0
    return torch.cat([images, images.rot90(2, (2, 3))[:2], cropped])


def _backbone(model: nn.Module, name: str) -> Backbone:
    """The backbone that `wrap` creates; zoo models normalise images themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare class does not say how its input is normalised
        return Backbone(model, normalize=not name.startswith("robustbench:"))


def _images(n: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Images in [0, 1] that differ in brightness, coarse structure and noise."""
    level = torch.rand(n, channels, 1, 1, generator=generator)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    coarse = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    fine = torch.rand(n, channels, size, size, generator=generator)
    return 0.4 * level + 0.4 * coarse + 0.2 * fine


def _fitting_images(model: nn.Module, name: str, generator: torch.Generator) -> Tensor:
    """Four images of the smallest size that the model accepts."""
    if name.startswith("robustbench:cifar"):
        own = (3, 32, 32)
    elif name.startswith("robustbench:"):
        own = (3, 224, 224)
    else:
        own = _backbone(model, name).input_size
        own = (own[0], own[1] or SIZES[0], own[2] or SIZES[0])
    fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
    sizes = [] if fixed else [s for s in SIZES if s < own[1]]
    for size in (*sizes, own[1]):
        images = _images(4, own[0], size, generator)
        try:
            with torch.no_grad():
                out = model(images)
            if isinstance(out, Tensor) and out.ndim == 2:
                return images
        except (RuntimeError, AssertionError, ValueError, TypeError):
            if size == own[1]:
                raise
    raise RuntimeError(f"{name} returned no logits for images of its own size {own}")


# -- one row -----------------------------------------------------------------------------------


def _heads(method: str, model: nn.Module, own: bool, images: Tensor) -> dict[str, Tensor] | None:
    """Untrained heads for the methods that need one, on features that are scaled to order one.

    Deep random networks amplify whatever differs from the images behind their statistics, and a
    task that is solved or failed with certainty has no gradient.
    """
    if method not in ("ttt", "mt3"):
        return None
    generator = torch.Generator().manual_seed(0)
    if method == "mt3":
        head, first = init_byol(model, generator), "projector.in.weight"
    else:
        split = get_method("ttt").config().split
        head, first = init_rotation(model, split, generator), "head.weight"
    net = tp.wrap(model, method, normalize=not own, tensors=head, **FIELDS[method])
    views = net.algorithm().task.draw(images, image_keys(images, 0), 0)[0].flatten(0, 1)
    with torch.no_grad():
        spread = net.backbone(views, pooled=True).std().clamp_min(1e-6)
    return head | {first: head[first] / spread}


def _some_parameters(model: nn.Module) -> str | list[str]:
    """What to adapt in a network without norms: its biases, or its first tensor."""
    names = [n for n, _ in model.named_parameters()]
    return r"bias$" if any(n.endswith("bias") for n in names) else names[:1]


def _moved(net: tp.Adapter, fresh: dict[str, Tensor], images: Tensor) -> dict:
    """How many of the tensors that adapt have changed since ``fresh``, of how many, and which not.

    Raises:
        AssertionError: another tensor has changed, or none has.
    """
    algorithm = net.algorithm()
    if hasattr(algorithm, "task"):  # adaptation ends with each image, so gradients show what moves
        views = algorithm.task.draw(images, image_keys(images, net.seed), 0)
        changed = dict.fromkeys(algorithm.source, False)
        for i in range(len(images)):
            leaves = {n: t.detach().requires_grad_() for n, t in algorithm.source.items()}
            loss = algorithm.task.loss(leaves, *(v[i] for v in views))
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            moves = dict(zip(leaves, (bool(g.any()) for g in grads), strict=True))
            changed = {n: moved or moves[n] for n, moved in changed.items()}
    else:
        state = net.adaptation_state()
        changed = {
            n.removeprefix("params."): not torch.equal(state[n], t)
            for n, t in fresh.items()
            if n.startswith("params.")
        }
    named = {f"model.{n}" for n in net.names}
    heads = set(net.learned_tensors())
    assert changed.keys() - heads == named, "adapts other tensors than it says"
    assert any(changed.values()), "one step moved nothing"
    still = sorted(n.removeprefix("model.") for n, moved in changed.items() if not moved)
    return {"moved": [len(changed) - len(still), len(changed)], "still": still[:6]}


def check(model: nn.Module, own: bool, images: Tensor, method: str) -> dict:
    """Check everything that is promised of ``method`` on ``model``, for one row of the report.

    Raises:
        Exception: any error; an AssertionError names a promise that was not kept.
    """
    options = {"normalize": not own, "seed": 0, "tensors": _heads(method, model, own, images)}
    options |= FIELDS.get(method, {})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    found: dict = {}
    start = time.perf_counter()
    try:
        net = tp.wrap(model, method, **options)
    except tp.InputError as error:
        if "params=" not in str(error):
            raise
        found["note"] = str(error)
        options["params"] = _some_parameters(model)
        net = tp.wrap(model, method, **options)
    found["wrap_s"] = time.perf_counter() - start
    found["own_mb"] = own_bytes(net, model) / 1e6
    if method == "mgg" and not net.backbone.has_batch_norm:
        net.fit_source_statistics([images], progress=False)
    assert "input:" in net.describe()

    per_image = method in ("ttt", "mt3")
    fresh = net.adaptation_state()
    logits = net(images)
    classes = model(images[:1].clone()).shape[1]
    assert logits.shape == (len(images), classes), f"logits of shape {tuple(logits.shape)}"
    assert torch.isfinite(logits).all(), "logits are not finite"
    if method != "source":
        found |= _moved(net, fresh, images)
    net.reset()
    assert _same(net.adaptation_state(), fresh), "reset is not the start"
    assert torch.equal(net(images), logits), "other logits after reset"
    net.reset()
    single = net(images[:1])
    assert torch.isfinite(single).all(), "one image: logits are not finite"
    assert net.skipped_updates == 0, "an update was skipped"

    if method != "source":
        still = options | {"lr": 0.0} | ({"chunk_size": 1} if per_image else {})
        kind = net.backbone.statistics.kind
        plain = tp.wrap(model, "source", normalize=not own, statistics=kind)
        zero = tp.wrap(model, method, **still)
        for batch in images.split(1) if per_image else (images,):
            assert torch.equal(zero(batch), plain(batch)), "lr=0 is not the plain model"
    after = model.state_dict()
    assert _same(after, before), "the wrapped model was written"
    assert modes == [m.training for m in model.modules()], "the wrapped model changed its mode"
    return found


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(t.nan_to_num(), b[n].nan_to_num()) for n, t in a.items()
    )


def own_bytes(net: tp.Adapter, model: nn.Module) -> int:
    """Bytes of an adapter's tensors that are not in the model's own storage."""
    shared = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    shared |= {t.untyped_storage().data_ptr() for t in model.buffers()}
    held = {}
    for t in (*net.parameters(), *net.buffers(), *net._tensors.values()):
        storage = t.untyped_storage()
        if storage.data_ptr() not in shared:
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


# -- the run -----------------------------------------------------------------------------------


def _free_bytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            values = dict(line.split(":") for line in lines)
        return 1024 * float(values["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def run_model(name: str, methods: list[str]) -> dict:
    """All rows of one model."""
    record: dict = {"rows": {}}
    try:
        model = _without_memory(lambda: build(name))
        needed = _COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
        if needed > _free_bytes():
            raise MemoryError(f"needs about {needed / 1e9:.0f} GB, more than is free")
        model = build(name)
        images = prepare(model, name)
    except Exception as error:  # a model that cannot be built gets a row with the reason
        return record | {"error": _reason(error)}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["input"] = list(images.shape[1:])
    norms = {type(model.get_submodule(m)).__name__ for m in norm_parameters(model)}
    record["norms"] = sorted(norms)
    for method in methods:
        start = time.perf_counter()
        try:
            row = check(model, name.startswith("robustbench:"), images, method)
        except Exception as error:  # the table shows the reason
            row = {"error": _reason(error)}
        record["rows"][method] = row | {"seconds": time.perf_counter() - start}
        gc.collect()
    return record


def _alone(name: str, methods: list[str]) -> dict:
    """Call `run_model` in another process, which the system may kill for its memory use."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_model, name, methods).result()
        except BrokenProcessPool as error:
            return {"rows": {}, "error": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def run(
    out: Path,
    methods: list[str],
    models: list[str] | None = None,
    limit: int | None = None,
    resume: bool = False,
    isolated: bool = False,
    modules: list[str] | None = None,
) -> dict:
    """Fill ``out`` with the results of all models, or of the named models or timm modules.

    ``isolated`` gives every model its own process, so that its memory is freed.
    """
    results = json.loads(out.read_text()) if resume and out.is_file() else {}
    versions = {p: version(p) for p in ("torch", "timm", "robustbench", "ttt-plugins")}
    if results and results["versions"]["timm"] != versions["timm"]:
        raise tp.InputError(f"{out} holds results of timm {results['versions']['timm']}")
    results = {"versions": versions, "models": {}, "alike": {}, "modules": {}} | results
    if models is None:
        results["modules"] = results["modules"] or smallest_entrypoints(modules)
        models = list(results["modules"].values())
        if modules is None and version("robustbench") is not None:
            results["alike"] = results["alike"] or architectures()
            models += dict.fromkeys(results["alike"].values())
    out.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(models[:limit])
    for name in bar:
        bar.set_description(name)
        done = results["models"].get(name, {"rows": {}})
        left = [m for m in methods if m not in done["rows"]]
        if left and "error" not in done:
            new = _alone(name, left) if isolated else run_model(name, left)
            results["models"][name] = done | new | {"rows": done["rows"] | new["rows"]}
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


# -- the report --------------------------------------------------------------------------------


def report(results: dict) -> str:
    """The results as Markdown."""
    methods = sorted({m for r in results["models"].values() for m in r["rows"]})
    module_of = {name: module for module, name in results["modules"].items()}
    lines, failures, notes, totals = [], [], [], {m: [0, 0, 0] for m in methods}
    for name, record in results["models"].items():
        cells = []
        for method in methods:
            row = record["rows"].get(method, {"error": record.get("error", "not run")})
            if "error" in row:
                cells.append("**fails**")
                failures.append(f"- `{name}` × {method}: {row['error']}")
                totals[method][2] += 1
            elif "note" in row:
                cells.append("with `params=`")
                notes.append(f"- `{name}` × {method}: {row['note']}")
                totals[method][1] += 1
            else:
                moved = row.get("moved")
                cells.append(f"{moved[0]}/{moved[1]}" if moved else "ok")
                totals[method][0] += 1
        size = "×".join(map(str, record.get("input", ["–"])))
        million = f"{record['parameters'] / 1e6:.1f}" if "parameters" in record else "–"
        norms = ", ".join(record.get("norms", [])) or "none"
        known = module_of.get(name, "")
        lines.append(f"| {known} | {name} | {million} | {size} | {norms} | {' | '.join(cells)} |")
    rows = [r for rec in results["models"].values() for r in rec["rows"].values() if "wrap_s" in r]
    wraps = [r["wrap_s"] for r in rows]
    known = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)
    text = [
        "# Which models work with which methods",
        "",
        f"Made by `python examples/coverage.py` with {known}. Random weights, two images a step.",
        "A cell says how many of the tensors that adapt moved in one step; the others have no "
        "gradient there (branches that do not run, biases in front of a norm or a softmax). "
        "`with params=`: the method's default finds nothing to adapt and says so; the row was "
        "made with parameters named. Each cell was checked for: it wraps; one step moves what it "
        "says and nothing else; finite logits of the right shape, for one image too; a step size "
        "of zero is the plain model bit for bit; reset is exact; the wrapped model is untouched.",
        "",
        "| method | works | works with `params=` | fails |",
        "|---|---|---|---|",
        *(f"| {m} | {a} | {b} | {c} |" for m, (a, b, c) in totals.items()),
        "",
    ]
    if wraps:
        text += [
            f"`wrap` takes {statistics.median(wraps):.3f} s (median; at most {max(wraps):.2f} s) "
            "beyond the model's own construction.",
            "",
        ]
    text += [
        f"| module | model | million parameters | input | norms | {' | '.join(methods)} |",
        "|---" * (5 + len(methods)) + "|",
        *lines,
        "",
    ]
    planned = dict.fromkeys([*results["modules"].values(), *results["alike"].values()])
    left = [f"- `{name}`" for name in planned if name not in results["models"]]
    alike = [f"- `{n}` as `{first}`" for n, first in results["alike"].items() if n != first]
    for title, part in (
        ("Failures", failures),
        ("Not run yet (`--resume` goes on with them)", left),
        ("Where `params=` is needed", notes),
        ("Entries of RobustBench's zoo with an architecture above (but for the classes)", alike),
    ):
        text += [f"## {title}", "", *(part or ["None."]), ""]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("coverage.json"))
    parser.add_argument("--report", type=Path, help="write the results as Markdown")
    parser.add_argument("--models", nargs="+", help="timm names or robustbench:<dataset>/<name>")
    parser.add_argument("--modules", nargs="+", help="timm modules, without RobustBench's zoo")
    parser.add_argument("--methods", nargs="+", choices=tp.list_methods())
    parser.add_argument("--limit", type=int, help="stop after this many models")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    methods = args.methods or tp.list_methods()
    results = run(args.out, methods, args.models, args.limit, args.resume, True, args.modules)
    if args.report is not None:
        args.report.write_text(report(results))


if __name__ == "__main__":
    main()
