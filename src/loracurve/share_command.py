"""The command `share`, which `cli.py` offers."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from loracurve.errors import UserError

__all__ = ["share"]


def share(
    run: str, out: str | None = None, hub: str | None = None, base: str | None = None, private: bool = False
) -> None:
    """Write the curve of a run with a model card into a folder, or upload both to the Hugging Face hub.

    Args:
        run: run directory, evaluated.
        out: new folder for curve_config.json, control_points.safetensors and README.md.
        hub: OWNER/NAME on the hub to upload them to; you must be logged in there.
        base: name of the base model on the hub. Default: the one the run used.
        private: make a new repository private.
    """
    from loracurve.sharing import push_curve, share_run

    if out is None and hub is None:
        raise UserError("share: expected --out FOLDER or --hub OWNER/NAME, found neither")
    with TemporaryDirectory() as temporary:
        folder = share_run(run, out or temporary, base, hub)
        if out is not None:
            print(f"Written to {out}; read {out}/README.md before others do")
        if hub is not None:
            print(f"Uploaded: {push_curve(folder, hub, private or None)}")
