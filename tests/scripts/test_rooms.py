"""The counts of `scripts/rooms.py` on a checkout drawn up for it."""

from __future__ import annotations

from pathlib import Path

from scripts.rooms import arrows_between_rooms, floors


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "rtdmd_cli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_rooms_arrows_and_floors(tmp_path: Path) -> None:
    files = {"__init__.py": "", "loose.py": "from rtdmd_cli.top import a\nfrom rtdmd_cli.low.b import B"}
    files |= {"top/__init__.py": '"""A face."""', "top/a.py": "def f():\n    import rtdmd_cli.low.b"}
    files |= {"top/own.py": "from rtdmd_cli.top import a", "low/__init__.py": "", "low/b.py": "B = 1"}
    write(tmp_path, files)
    graph = arrows_between_rooms(tmp_path)
    top, low, loose = (f"rtdmd_cli/{name}" for name in ("top", "low", "loose.py"))
    assert graph == {top: {low}, low: set(), loose: {top, low}} and floors(graph) == 3


def test_a_circle_shares_a_floor(tmp_path: Path) -> None:
    files = {"__init__.py": "", "a/a.py": "import rtdmd_cli.b.b", "b/b.py": "import rtdmd_cli.a.a"}
    write(tmp_path, files | {"c/c.py": "import rtdmd_cli.a.a"})
    assert floors(arrows_between_rooms(tmp_path)) == 2
