"""Curves to and from the Hugging Face hub: the files of a curve, what a run knows of unknown inputs, and a model card.

Nothing that is fetched is code or pickle.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError

from loracurve.curve.files import FILES, BaseRecord, write_curve
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.model_card import model_card
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError, one_line
from loracurve.system.files import atomic_write
from loracurve.system.paths import exists, is_file

__all__ = ["CARD", "UNKNOWNS", "curve_folder", "hub_base", "push_curve", "push_model", "write_shared"]


CARD = "README.md"

UNKNOWNS = ("unknowns.json", "unknowns.safetensors")
"""what goes along with the files of a curve, where its run has it (`runs.carried`)"""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def curve_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or where the files of a curve on the hub lie in the local cache once they are fetched.

    Args:
        name: a folder, of a run too, or OWNER/NAME on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there is neither such a folder nor such a repository, or no way to it; a model in their place.
    """
    if not isinstance(name, str | Path):
        raise UserError(
            "expected a folder or OWNER/NAME on the hub and then the base, found "
            f"{type(name).__name__} in place of the folder; give the folder first"
        )
    if is_file(Path(name) / "curve" / FILES[0]):  # a run's
        return Path(name) / "curve"
    if exists(name) or not _NAME.fullmatch(str(name)) or "/" not in str(name):
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[*FILES, *UNKNOWNS]))
    except (OSError, ValueError, HTTPError) as error:
        reason = one_line(error, 200)
        raise UserError(
            f"{name}: expected a curve folder or the name of a repository on the hub, found no such folder here and "
            f"none to fetch ({reason})"
        ) from error


def hub_base(config: peft.LoraConfig, base: str | None = None) -> str:
    """The name of the base model on the hub; a path on this machine would mean nothing to others, and is refused."""
    name = base or config.base_model_name_or_path
    if name is None or os.path.exists(name) or not _NAME.fullmatch(name):
        raise UserError(f"base: expected the base model's name on the hub, found {name!r}; give it (share: --base)")
    return name


def push_curve(
    folder: str | Path, repo: str, private: bool | None = None, token: str | None = None, keep_card: bool = False
) -> str:
    """Upload the files of a curve folder and its card to OWNER/NAME, which is made if it isn't there.

    Args:
        folder: with curve_config.json, control_points.safetensors and README.md, and perhaps `UNKNOWNS`.
        private: of a new repository. None: the owner's default.
        token: of the hub. None: the one that is logged in.
        keep_card: a README.md that the repository has already stays.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub refuses or cannot be reached.
    """
    try:
        api = HfApi(token=token)
        place = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files = [name for name in (*FILES, *UNKNOWNS) if exists(Path(folder) / name)]
        if not (keep_card and api.file_exists(place, CARD)):
            files.append(CARD)
        commit = api.upload_folder(
            repo_id=place, folder_path=Path(folder), allow_patterns=files, commit_message="Upload a curve of adapters"
        )
    except (OSError, ValueError, HTTPError) as error:
        reason = one_line(error, 240)
        raise UserError(f"{repo}: cannot upload ({reason}); is the name OWNER/NAME, and are you logged in?") from error
    return str(commit.commit_url)


def push_model(
    config: peft.LoraConfig,
    spec: CurveSpec,
    points: ControlPoints,
    repo: str,
    base: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    record: BaseRecord | None = None,
) -> str:
    """`push_curve` of a curve in memory, with a card that knows no run and replaces none on the hub."""
    name = hub_base(config, base)
    with TemporaryDirectory() as folder:
        write_shared(config, spec, points, name, model_card(config, spec, name, repo), Path(folder), record)
        return push_curve(folder, repo, private, token, keep_card=True)


def write_shared(
    config: peft.LoraConfig,
    spec: CurveSpec,
    points: ControlPoints,
    base: str,
    card: str,
    folder: Path,
    record: BaseRecord | None = None,
) -> Path:
    """Write a curve and its card into a folder, which is returned; `base` is the base model's name on the hub."""
    write_curve(config, spec, points, folder, base, record)
    atomic_write(folder / CARD, lambda p: p.write_text(card, encoding="utf-8"))
    return folder
