"""Links to torch, torchvision and what they need, for a second environment: FOLDER of links."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
todo, done = ["torch", "torchvision"], set()
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in done:
        continue
    done.add(name)
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue  # needed on other platforms only
    site = Path(distribution.locate_file("")).resolve()
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (folder / top).is_symlink():
            (folder / top).symlink_to(site / top)
    todo += [
        re.match(r"[\w.\-]+", needed)[0]
        for needed in distribution.requires or []
        if "extra ==" not in needed
    ]
