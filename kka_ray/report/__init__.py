"""The HTML report: one self-contained file with the numbers, curves, images and maps of a finished run.

It is made of the run's folder alone, so it can be written anew at any time, without the store and without Ray.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from kka_ray.amounts import amount
from kka_ray.errors import ResourceError
from kka_ray.files import write_text
from kka_ray.report import sections, wording
from kka_ray.report.run_folder import RunFolder

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a finished run's folder and returns its path.

    The file needs no network and no other file. It is written whole or not at all: an earlier report stays until the
    new one is complete. Raises StoreError if the folder holds no finished run or a damaged one, ResourceError if the
    file cannot be written.
    """
    html = _environment().get_template("report.html").render(sections.page(RunFolder.read(folder)))
    path = folder / "report.html"
    try:
        write_text(path, html)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error}. Free some room or mend its permissions") from error
    return path


def _environment() -> Environment:
    """Everything is escaped that is not marked as markup; a name that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("kka_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "amount": amount,
        "count": wording.count,
        "percent": wording.percent,
        "duration": wording.duration,
        "position": wording.position,
        "signed": wording.signed,
    }
    environment.tests["varied"] = wording.varies
    return environment
