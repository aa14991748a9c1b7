"""From a model's name to a local folder: a folder, a model shipped with the package, or a download from a hub."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ernie45.errors import CheckpointError

DEFAULT_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "spm.model", "*.jinja")

_SIZES = ("0.3B", "21B-A3B", "300B-A47B", "VL-28B-A3B", "VL-424B-A47B")
PUBLISHED_NAMES: tuple[str, ...] = (
    *(f"baidu/ERNIE-4.5-{size}{base}-{form}" for size in _SIZES for base in ("", "-Base") for form in ("Paddle", "PT")),
    "baidu/ERNIE-4.5-21B-A3B-Thinking",
    "baidu/ERNIE-4.5-VL-28B-A3B-Thinking",
)

_SHIPPED_MODELS = Path(__file__).resolve().parent.parent / "data"
_HUBS = {"hf": "Hugging Face", "aistudio": "AI Studio", "modelscope": "ModelScope"}
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


def resolve_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        name: in this order: an existing folder; the name of a model shipped with the package ("ernie45-tiny");
            "hf:owner/name", "aistudio:owner/name" or "modelscope:owner/name"; "owner/name", which means Hugging Face.
        revision: branch, tag or commit on the hub; its default branch if None. Unused for local folders.
        cache_dir: where downloads are kept; the hub's usual place if None.
        allow_patterns: the files wanted, as shell patterns; `DEFAULT_PATTERNS` if None.

    Returns:
        A folder that exists. Its contents are not checked here.

    Hugging Face downloads honour HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. AI Studio and ModelScope need
    their packages `aistudio-sdk` and `modelscope`.

    Raises:
        CheckpointError: nothing has that name, or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir() and name != "":  # Path("") is the current folder
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file, expected the folder that holds the model")
    if _PLAIN_NAME.fullmatch(str(name)) and (_SHIPPED_MODELS / str(name)).is_dir():
        return _SHIPPED_MODELS / str(name)
    hub, repository = _split_hub(str(name))
    if hub is None:
        raise CheckpointError(f"{name}: no such folder, and not a hub name like owner/name.{_suggestion(str(name))}")
    patterns = list(DEFAULT_PATTERNS if allow_patterns is None else allow_patterns)
    downloaded = Path(_download(hub, repository, revision, cache_dir, patterns))
    if not downloaded.is_dir():
        raise CheckpointError(f"{repository} on {_HUBS[hub]}: holds no file that matches {', '.join(patterns)}")
    return downloaded


def _split_hub(name: str) -> tuple[str | None, str]:
    """("hf", "owner/name") of a hub name, (None, name) of anything else."""
    prefix, colon, rest = name.partition(":")
    hub, repository = (prefix, rest) if colon else ("hf", name)
    if hub in _HUBS and _REPOSITORY.fullmatch(repository):
        return hub, repository
    return None, name


def _download(
    hub: str, repository: str, revision: str | None, cache_dir: str | Path | None, patterns: list[str]
) -> str:
    download = {"hf": _download_hugging_face, "aistudio": _download_aistudio, "modelscope": _download_modelscope}[hub]
    try:
        return download(repository, revision, cache_dir, patterns)
    except CheckpointError:
        raise
    except Exception as error:  # each SDK raises the errors of several HTTP libraries: all become one kind here
        raise CheckpointError(_explain(error, hub, repository, revision)) from error


def _download_hugging_face(
    repository: str, revision: str | None, cache_dir: str | Path | None, patterns: list[str]
) -> str:
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise _missing_package("Hugging Face", "huggingface_hub") from error
    if not constants.HF_HUB_OFFLINE:
        _announce(repository, constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE)
    return snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)


def _download_aistudio(repository: str, revision: str | None, cache_dir: str | Path | None, patterns: list[str]) -> str:
    try:
        from aistudio_sdk.snapshot_download import snapshot_download
    except ImportError as error:
        raise _missing_package("AI Studio", "aistudio-sdk") from error
    _announce(repository, "AI Studio", cache_dir or "its own cache")
    # This SDK knows no cache folder, only a folder for the files themselves.
    local_dir = None if cache_dir is None else str(Path(cache_dir) / repository)
    return str(snapshot_download(repo_id=repository, revision=revision, local_dir=local_dir, allow_patterns=patterns))


def _download_modelscope(
    repository: str, revision: str | None, cache_dir: str | Path | None, patterns: list[str]
) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise _missing_package("ModelScope", "modelscope") from error
    _announce(repository, "ModelScope", cache_dir or "its own cache")
    cache = None if cache_dir is None else str(cache_dir)
    return str(snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=patterns))


def _missing_package(hub: str, package: str) -> CheckpointError:
    return CheckpointError(f"downloading from {hub} needs the package {package}: pip install {package}")


def _announce(repository: str, source: str, destination: str | Path) -> None:
    print(
        f"ernie45: fetching {repository} from {source} into {destination} (files already there are kept)",
        file=sys.stderr,
    )


def _explain(error: Exception, hub: str, repository: str, revision: str | None) -> str:
    """One message for whatever went wrong: what, the library's own words, what to do."""
    first_line = (str(error).strip().splitlines() or ["no details"])[0]
    cause = f" [{type(error).__name__}: {first_line}]"
    where = f"{repository} on {_HUBS[hub]}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"{where}: access must be granted: accept its terms on its page and log in with `hf auth login`.{cause}"
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{where}: no such repository, or a private one, nor a folder of that name.{_suggestion(repository)}{cause}"
        )
    if "HFValidationError" in kinds:
        return f"{where}: not a valid name, expected owner/name.{_suggestion(repository)}{cause}"
    if "RevisionNotFoundError" in kinds:
        return f"{where}: has no revision {revision!r}; leave it out or name a branch, tag or commit of it.{cause}"
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return (
            f"{where}: not (completely) in the cache, and {_why_not_fetched()}. No folder has that name either.{cause}"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{where}: cannot be stored at {error.filename}: {error.strerror}; name another place with cache_dir"
    return (
        f"{where}: the download failed; what was fetched is kept, so try again, or download the files yourself and "
        f"give the folder.{cause}"
    )


def _why_not_fetched() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to download: unset it, or give a folder"
    return (
        f"{constants.ENDPOINT} cannot be reached or does not have it: check the network and the name, set HF_ENDPOINT "
        "to a mirror, or give a folder"
    )


def _suggestion(name: str) -> str:
    """What the caller may have meant: both forms of a published model, or the closest published names."""
    model = name.rpartition(":")[2].rpartition("/")[2].lower()
    both = [f"baidu/ERNIE-4.5-{size}{base}" for size in _SIZES for base in ("", "-Base")]
    for known in both:
        if model == known.partition("/")[2].lower():
            return (
                f" Did you mean {known}-Paddle or {known}-PT? It is published in these two layouts; both can be read."
            )
    by_model = {known.partition("/")[2].lower(): known for known in PUBLISHED_NAMES}
    close = [by_model[match] for match in difflib.get_close_matches(model, by_model, n=3, cutoff=0.75)]
    if close:
        return f" Did you mean {' or '.join(close)}?"
    shipped = sorted(path.name for path in _SHIPPED_MODELS.iterdir()) if _SHIPPED_MODELS.is_dir() else []
    examples = ["a folder", *shipped, PUBLISHED_NAMES[0]]
    return f" Give {', '.join(examples[:-1])} or a published name such as {examples[-1]}."
