"""Finding adapters on the Hub by the tags that `ttt_plugins.artifacts.card` gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import constants

from ..errors import HubError
from ..utils.connection import in_time
from ..utils.text import printable
from .hub_access import DEFAULT_ACCESS, Access, make_api, readable

__all__ = ["Found", "search"]

_TAG = "ttt_plugins"
#: Most adapters that a search returns.
_MOST = 200
#: Most figures of an adapter, and most characters of a line of its author's.
_FIGURES, _LINE = 20, 240


@dataclass(frozen=True)
class Found:
    """A published adapter.

    Attributes:
        name: ``org/name``, for `ttt_plugins.from_pretrained`.
        tags: its tags on the Hub, the method's name among them.
        base_model: repository of the classifier that it adapts; None if it names none.
        figures: what its card claims: what was measured on which data, and the value in [0, 1].
        downloads: downloads in the last 30 days; None if the Hub does not tell.
    """

    name: str
    tags: tuple[str, ...]
    base_model: str | None
    figures: tuple[tuple[str, float], ...]
    downloads: int | None

    def describe(self) -> str:
        """The adapter and its figures, as lines of text."""
        base = "" if self.base_model is None else f" around {self.base_model}"
        seen = "" if self.downloads is None else f", {self.downloads:,} downloads"
        words = ("ttt_plugins", "test-time-training", "test-time-adaptation")
        tags = [t for t in self.tags if t not in words and ":" not in t]
        lines = [f"{self.name}{base} ({', '.join(tags)}{seen})"]
        lines += [f"  {100 * value:.2f} %  {what}" for what, value in self.figures]
        return "\n".join(printable(line)[:_LINE] for line in lines)


def search(
    method: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    access: Access = DEFAULT_ACCESS,
) -> list[Found]:
    """Adapters on the Hub, those with most downloads first, 200 at most.

    Args:
        method: only of this method.
        base_model: only around the classifier in this repository, ``org/name``.
        dataset: only with this data set in their card, by its name on the Hub.
        access: how to reach the Hub.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    wanted = [_TAG, method, base_model and f"base_model:{base_model}"]
    wanted.append(dataset and f"dataset:{dataset}")
    tags = [tag for tag in wanted if tag]
    with readable("the Hub", access, "searching"):
        if constants.HF_HUB_OFFLINE or access.local_files_only:
            raise HubError("offline mode (HF_HUB_OFFLINE=1) forbids searching the Hub")
        api = make_api(access)
        return in_time(
            lambda: _found(api.list_models(filter=tags, cardData=True, sort="downloads"))
        )


def _found(models: Iterable[Any]) -> list[Found]:
    return [_read(model) for model in islice(models, _MOST)]


def _read(model: Any) -> Found:
    """What the Hub says about a model; of its card, which is anybody's, only text and numbers."""
    card = getattr(model, "card_data", None)
    figures = []
    for result in (getattr(card, "eval_results", None) or [])[:_FIGURES]:
        value = result.metric_value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
            name = result.metric_name or result.metric_type
            figures.append((f"{name}, {result.dataset_name}", float(value)))
    base = getattr(card, "base_model", None)
    base = base[0] if isinstance(base, list) and base else base
    downloads = getattr(model, "downloads", None)
    return Found(
        str(model.id),
        tuple(str(tag) for tag in model.tags or ()),
        base if isinstance(base, str) else None,
        tuple(figures),
        downloads if isinstance(downloads, int) else None,
    )
