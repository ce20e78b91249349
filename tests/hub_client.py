"""A process of its own for what is read from the environment at import: the genuine Hub client.

Reads one job a line (JSON) from standard input and answers with one line. Waiting between the
client's retries is skipped, nothing else of it is changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import warnings

import timm
import torch
from safetensors.torch import load_file, save_file

import ttt_plugins as tp
from ttt_plugins.cli import main
from ttt_plugins.data.loading import ImageLoader
from ttt_plugins.data.opening import open_images


def logits(net, job):
    """Two batches, one after the other: what was adapted to the first shows in the second."""
    images = load_file(job["images"])["images"]
    with torch.no_grad():
        found = torch.cat([net(images), net(images)])
    save_file({"logits": found.contiguous()}, job["out"])
    return {"method": getattr(net, "method", None), "origin": str(getattr(net, "origin", ""))}


def load(job):
    return logits(tp.from_pretrained(job["name"], **job.get("options", {})), job)


def wrap(job):
    net = tp.wrap(job["name"], **job["options"])
    if "folder" in job:
        net.save_pretrained(job["folder"])
    return logits(net, job)


def save(job):
    net = tp.from_pretrained(job["name"], **job.get("options", {}))
    return {"folder": str(net.save_pretrained(job["folder"]))}


def push(job):
    net = tp.from_pretrained(job["name"], **job.get("load", {}))
    return {"commit": net.push_to_hub(job["repository"], **job.get("options", {}))}


def plain_timm(job):
    model = timm.create_model(job["name"], pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[k]).view(-1, 1, 1) for k in ("mean", "std"))
    return logits(lambda x: model((x - mean) / std), job)


def images(job):
    source = open_images(job["source"], stream=job.get("stream", False))
    batches = list(ImageLoader(source, workers=0))
    save_file({"images": torch.cat([b.images for b in batches])}, job["file"])
    return {"labels": torch.cat([b.labels for b in batches]).tolist(), "classes": source.classes}


def command_line(job):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(job["arguments"])
    return {"code": code, "out": out.getvalue(), "error_text": error.getvalue()}


def full_disk(job):
    """Files may have 4 KB from now on: writing more fails as it does on a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return {}


JOBS = {
    f.__name__: f for f in (load, wrap, save, push, plain_timm, images, command_line, full_disk)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    time.sleep = lambda seconds: None
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = JOBS[job["do"]](job)
        except Exception as error:
            kinds = [c.__name__ for c in type(error).__mro__]
            answer = {"error": str(error), "kinds": kinds}
        print(json.dumps(answer), file=answers, flush=True)
