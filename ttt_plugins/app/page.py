"""The page itself, in gradio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from ..adapter import Adapter
from ..demo.sample import load_sample
from ..errors import MissingDependencyError, TTTError
from .pictures import Pictures, dropped_pictures, sample_pictures, source_pictures
from .session import CORRUPTIONS, Session, Step

__all__ = ["build_page", "launch"]

_NONE = "none"
_DROPPED = "dropped pictures"
_SAMPLE = "sample: "
#: Number of pictures of a batch that the gallery shows, and the width of small ones in pixels.
_SHOWN = 8
_SIDE = 96
#: Largest number of pictures that a stream reads.
_MOST = 320


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise MissingDependencyError(
            'the page needs gradio: pip install "ttt-plugins[app]"'
        ) from error


def build_page(
    build: Callable[[str], Adapter],
    methods: Sequence[str],
    *,
    title: str = "ttt_plugins",
    source: str | None = None,
) -> Any:
    """The page as gradio's ``Blocks``.

    Args:
        build: creates the adapter of a method by its name, as for `Session`.
        methods: the methods to choose from; the first is chosen.
        title: what is adapted, such as the model's name.
        source: a source of labelled pictures to offer besides the sample, as for `open_images`.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    gr = _gradio()
    with gr.Blocks(analytics_enabled=False, title=title) as page:
        state = gr.State(None)
        gr.Markdown(f"# {title}\nThe same network without adaptation (source) and adapting itself.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(gr, methods, source)
                with gr.Row():
                    start = gr.Button("Start", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", elem_id="stop")
                    reset = gr.Button("Reset", elem_id="reset")
            with gr.Column(scale=2):
                status = gr.Markdown("", elem_id="status")
                plot = gr.LinePlot(x="pictures", y="percent", color="line", height=260)
                gallery = gr.Gallery(columns=4, height=420, label="Source → adapter")
                health = gr.Markdown("", elem_id="health")
        shown = [state, status, plot, gallery, health]

        def run(session: Session | None, *values: Any) -> Iterator[tuple]:
            try:
                yield from _run(session or Session(build, values[-1]), source, *values)
            except TTTError as error:
                raise gr.Error(" ".join(str(error).split())) from error

        inputs = [state, *controls]
        running = start.click(run, inputs, shown, api_name="run", show_progress="hidden")
        stop.click(None, cancels=[running])
        reset.click(_clear, [state], shown, cancels=[running], api_name="reset")
        chosen, files, *_ = controls
        files.upload(lambda: _DROPPED, None, chosen, api_name="dropped")
    return page


def _controls(gr: Any, methods: Sequence[str], source: str | None) -> list[Any]:
    """The inputs of a stream, in the order of `_run`'s arguments."""
    kinds = [f"{_SAMPLE}{kind}" for kind in load_sample(n=1).images]
    choices = [*([source] if source else []), *kinds, _DROPPED]
    first = source or f"{_SAMPLE}fog"
    noises = [_NONE, *CORRUPTIONS]
    return [
        gr.Dropdown(choices, value=first, label="Pictures", elem_id="pictures"),
        gr.File(label="Drop pictures here", file_count="multiple", file_types=["image"]),
        gr.Dropdown(noises, value=_NONE, label="Corruption", elem_id="corruption"),
        gr.Slider(1, 5, value=3, step=1, label="Severity"),
        gr.Slider(16, _MOST, value=192, step=16, label="Number of pictures"),
        gr.Slider(1, 64, value=16, step=1, label="Pictures at once"),
        gr.Radio(list(methods), value=methods[0], label="Method", elem_id="method"),
    ]


def _run(
    session: Session,
    source: str | None,
    name: str,
    dropped: Sequence[str] | None,
    corruption: str,
    severity: float,
    count: float,
    batch_size: float,
    method: str,
) -> Iterator[tuple]:
    """One stream; what the page shows after each batch."""
    if session.method != method:
        session.choose(method)
    pictures = _read(session.net, name, dropped, int(count), source)
    stream = session.stream(
        pictures,
        batch_size=int(batch_size),
        corruption=None if corruption == _NONE else corruption,
        severity=int(severity),
    )
    for step in stream:
        yield _shown(session, pictures, step)


def _clear(session: Session | None) -> tuple:
    if session is not None:
        session.reset()
    return session, "Back at the source.", None, None, ""


def launch(
    page: Any, *, host: str | None = None, port: int | None = None, wait: bool = True
) -> str:
    """Serve the page, by default until Ctrl-C; its address."""
    theme = _gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme,  # nothing is fetched from other hosts
        prevent_thread_lock=not wait,
        quiet=True,
    )
    return address


def _read(
    net: Adapter, name: str, dropped: Sequence[str] | None, count: int, source: str | None
) -> Pictures:
    if name == _DROPPED:
        return dropped_pictures(net, dropped or (), count)
    if name.startswith(_SAMPLE) and name != source:
        return sample_pictures(net, name.removeprefix(_SAMPLE), count)
    return source_pictures(net, source, count)


def _shown(session: Session, pictures: Pictures, step: Step) -> tuple:
    """The state and what the page shows of it."""
    return (
        session,
        _status(session, pictures),
        _curves(session),
        _gallery(pictures, step),
        _health(session),
    )


def _status(session: Session, pictures: Pictures) -> str:
    point = session.points[-1]
    lines = [f"**{point.images} pictures since the last reset.**"]
    if point.source is not None and point.adapter is not None:
        lines.append(
            f"Accuracy: source {point.source:.1f} %, {session.method} {point.adapter:.1f} % "
            f"({point.adapter - point.source:+.1f} points)."
        )
    else:
        lines.append("There are no labels, so that only confidence can be shown.")
    lines.append(
        f"Mean confidence: source {point.source_confidence:.1f} %, {session.method} "
        f"{point.adapter_confidence:.1f} %."
    )
    if pictures.skipped:
        lines.append(f"{len(pictures.skipped)} damaged pictures were left out.")
    return " ".join(lines)


def _curves(session: Session) -> Any:
    import pandas

    rows = []
    for point in session.points:
        if point.source is None:
            pair = (point.source_confidence, point.adapter_confidence)
            kind = "confidence"
        else:
            pair = (point.source, point.adapter)
            kind = "accuracy"
        for label, value in zip(("source", session.method), pair, strict=True):
            rows.append((point.images, value, f"{label}, {kind}"))
    return pandas.DataFrame(rows, columns=["pictures", "percent", "line"])


def _gallery(pictures: Pictures, step: Step) -> list[tuple[Any, str]]:
    found = []
    for row in range(min(_SHOWN, len(step.images))):
        image = to_pil_image(step.images[row])
        if image.width < _SIDE:
            image = image.resize(
                (_SIDE, _SIDE * image.height // image.width), Image.Resampling.NEAREST
            )
        words = []
        for classes in (step.source, step.adapter):
            place = int(classes[row])
            name = pictures.names[place] if pictures.names else f"class {place}"
            mark = ""
            if step.labels is not None:
                mark = " ✓" if place == int(step.labels[row]) else " ✗"
            words.append(f"{name}{mark}")
        found.append((image, " → ".join(words)))
    return found


def _health(session: Session) -> str:
    signals = ", ".join(f"{name} {value:.3g}" for name, value in session.health.items())
    lines = [f"Guard's signals: {signals}."] if signals else ["This method has no guard."]
    lines += [
        f"- after {event.images} pictures: {event.reason}, {event.action}"
        for event in session.events
    ]
    return "\n".join(lines)
