"""Publishing an artifact folder as a repository on the Hugging Face Hub.

A copy is published. If the artifact names a classifier in a local folder, the copy contains that
classifier; paths of this machine are shortened, and the card names the repository.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..errors import ArtifactError, HubError
from ..utils.connection import in_time
from ..version import __version__
from .card import render_card
from .evaluations import PATTERN, evaluation_files, for_benchmark
from .folder import FILES, Artifact, check_plain, is_bundled, read_artifact, write_artifact
from .hub import is_repository
from .hub_access import Access, make_api, readable
from .measured import load_measured
from .schema import OWN_WEIGHTS, timm_part
from .tensor_files import fingerprint

__all__ = ["publish", "upload"]

#: An absolute path: not preceded by a letter, a colon or a slash, as in a web address.
_PATH = re.compile(r"(?<![\w:/.~\-])(?:~|[A-Za-z]:[\\/]|/)(?:[^\s'\"]*[\\/])?([^\s'\"\\/]+)")


def _shorten(value: Any) -> Any:
    """``/home/me/data`` -> ``.../data`` in all strings of a JSON value."""
    if isinstance(value, str):
        return _PATH.sub(r".../\1", value)
    if isinstance(value, Mapping):
        return {key: _shorten(v) for key, v in value.items()}
    return [_shorten(v) for v in value] if isinstance(value, list) else value


def _embed(artifact: Artifact, where: Path) -> Artifact:
    """Put the classifier of a local folder into the artifact; its path is of no use elsewhere."""
    backbone = artifact.config["backbone"]
    remedy = "publish that folder first and wrap it by its repository's name, then save again"
    try:
        model = read_artifact(Path(backbone["name"]))
    except ArtifactError as error:
        raise ArtifactError(
            f"{where} adapts a classifier in the folder {backbone['name']}, whose weights must be "
            f"published too, but it cannot be read ({error}): put it back, or {remedy}"
        ) from error
    fits = fingerprint(model.weights or {}) == backbone.get("fingerprint")
    if model.weights is None or not fits:
        raise ArtifactError(
            f"{where} was made for other weights than those now in {backbone['name']}: {remedy}"
        )
    part = timm_part(model.config)
    backbone = backbone | {"source": OWN_WEIGHTS, "name": part["architecture"]}
    return replace(
        artifact, config=artifact.config | part | {"backbone": backbone}, weights=model.weights
    )


def _portable(
    folder: Path, repository: str, measured: Any = None, benchmark: str | None = None
) -> Artifact:
    """The artifact to publish for an artifact folder.

    Raises:
        ArtifactError: it cannot be loaded, or the folder of its classifier is missing.
    """
    artifact = read_artifact(folder)
    own_words = artifact.card != render_card(folder.resolve().name, artifact)
    if measured is not None:
        artifact = replace(artifact, results=load_measured(measured))
    if benchmark is not None:
        artifact = replace(artifact, results=for_benchmark(artifact.results, benchmark))
    if artifact.config["backbone"]["source"] == "folder":
        artifact = _embed(artifact, folder)
    records = {
        k: _shorten(artifact.config[k]) for k in ("training", "card") if k in artifact.config
    }
    config, results = artifact.config | records, _shorten(artifact.results)
    if config != artifact.config or results != artifact.results:
        warnings.warn("paths of this machine are shortened in the published records", stacklevel=4)
    artifact = replace(artifact, config=config, results=results)
    if own_words and measured is None:
        return artifact  # its author wrote the card
    return replace(artifact, card=render_card(repository, artifact))


def publish(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    measured: str | Path | Mapping[str, Any] | None = None,
    benchmark: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
) -> tuple[str, bool]:
    """Publish an artifact folder as a Hub repository; see `upload`.

    Args:
        folder: artifact folder.
        repository: ``org/name``; created if it does not exist.
        private: whether a new repository is private; None for its owner's default.
        token: access token that may write; None for that of ``hf auth login`` or HF_TOKEN.
        measured: results to publish with the artifact, as for
            `ttt_plugins.artifacts.measured.load_measured`.
        benchmark: data set on the Hub, ``"ORG/NAME[:TASK]"``, for whose leaderboard the figures
            are written to ``.eval_results`` (`ttt_plugins.artifacts.evaluations`).
        revision: branch to publish on, created if it does not exist; None for the default branch.
        tag: name for the commit.

    Returns:
        the commit, and whether it is new.

    Raises:
        ArtifactError: the folder is not an artifact, or the folder of its classifier is missing.
        HubError: the Hub refuses, or cannot be reached.
    """
    _check_repository(repository)
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise ArtifactError(f"{folder!r} is not an artifact folder; name the one to publish")
    places: dict[str, Any] = {"private": private, "token": token, "revision": revision, "tag": tag}
    if is_bundled(folder) and measured is None and benchmark is None:
        # The published files are identical to those in the package.
        read_artifact(folder)
        return upload(Path(folder), repository, **places)
    if not is_bundled(folder):
        check_plain(Path(folder))
    artifact = _portable(Path(folder), repository, measured, benchmark)
    with tempfile.TemporaryDirectory(prefix="ttt-plugins-") as work:
        staged = write_artifact(Path(work) / "artifact", artifact)
        for name, text in evaluation_files(artifact, repository).items():
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_text(text, encoding="utf-8")
        return upload(staged, repository, **places)


def _check_repository(repository: Any) -> None:
    if not isinstance(repository, str) or "@" in repository or not is_repository(repository):
        raise HubError(
            f"{str(repository)[:200]!r} cannot be the name of a repository: it must be ORG/NAME"
        )


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
) -> tuple[str, bool]:
    """Upload an artifact folder to a repository in one commit.

    The repository is created if it does not exist. Files of an earlier artifact that the folder
    does not have are deleted; all other files are kept.

    Args:
        folder: artifact folder.
        repository: ``org/name``.
        private: whether a new repository is private; None for its owner's default.
        token: access token that may write; None for that of ``hf auth login`` or HF_TOKEN.
        message: message of the commit.
        revision: branch to publish on, created if it does not exist; None for the default branch.
        tag: name for the commit; one that names another commit is refused.

    Returns:
        the commit, and whether it is new; no commit is made if no file has changed.

    Raises:
        ArtifactError: a file of the folder is not a plain file.
        HubError: the Hub refuses, or cannot be reached; nothing is published.
    """
    _check_repository(repository)
    if not is_bundled(folder):  # installers may link the files of a package to their cache
        check_plain(folder)
    for name in (revision, tag):
        if name is not None and not is_repository(f"{repository}@{name}"):
            raise HubError(f"{name[:200]!r} cannot be the name of a branch or a tag")
    access = Access(revision, token=token)
    api = make_api(access)
    with readable(repository, access, "publishing"):
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"offline mode (HF_HUB_OFFLINE=1) forbids publishing {repository}")
        before = _prepared(api, repository, private, revision)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*FILES, PATTERN],
            delete_patterns=[*FILES, PATTERN],
            commit_message=message or f"Publish with ttt_plugins {__version__}",
            revision=revision,
        )
        if tag is not None:
            in_time(lambda: api.create_tag(repository, tag=tag, revision=commit.oid))
    return commit.oid, commit.oid != before


def _prepared(
    api: HfApi, repository: str, private: bool | None, revision: str | None
) -> str | None:
    """Create the repository and the branch if they do not exist; return the branch's commit."""
    before = None
    try:
        existing = in_time(lambda: api.model_info(repository))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        in_time(lambda: api.create_repo(repository, private=private, exist_ok=True))
    else:
        before = existing.sha
        if private and existing.private is False:
            raise HubError(
                f"{repository} exists and is public: make it private in its settings first, "
                "or publish under another name; nothing was published"
            )
    if revision is not None:
        in_time(lambda: api.create_branch(repository, branch=revision, exist_ok=True))
        before = in_time(lambda: api.model_info(repository, revision=revision)).sha
    return before
