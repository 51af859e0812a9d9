"""Names of things outside: `pkg://import_name/path/inside` is a file or folder of an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from overnight.errors import Complaint, UserError, nearest


def resolve_package_path(reference: str, where: str) -> Path:
    """The path behind `pkg://name/inside`; the package itself is not imported.

    Raises:
        UserError: when the package is not installed or holds no such path; `where` is the config's place.
    """
    name, _, inside = reference.removeprefix("pkg://").partition("/")
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(Complaint(where, f"needs the installed package {name!r}", repr(reference)))
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / inside
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else folder
        siblings = [f"pkg://{name}/{p.relative_to(folder)}" for p in sorted(parent.iterdir())]
        raise UserError(Complaint(where, "no such path in the package", repr(reference), nearest(reference, siblings)))
    return path
