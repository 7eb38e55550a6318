"""Count the rooms of the package, their floors and the arrows between them.

    python scripts/rooms.py [CHECKOUT]

A room is a folder of Python files without folders below it, or a file that stands loose in a folder that has some. An arrow
leads from a room to one that it imports. A room stands one floor above the highest room that it imports; rooms that import
each other in a circle share a floor.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "rtdmd_cli"


def module_of(path: Path) -> str:
    """`a.b.c` of a/b/c.py, and of a/b/c/__init__.py."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path, root: Path) -> str:
    """The folder of a file, or the file itself where the folder holds other folders of code."""
    folder = (root / path).parent
    loose = any(child.is_dir() and any(child.glob("*.py")) for child in folder.iterdir())
    return str(path if loose else path.parent)


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (name := full if full in known else node.module) in known:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def arrows_between_rooms(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms it imports. A package's empty face is no room."""
    paths = [path.relative_to(root) for path in sorted((root / PACKAGE).rglob("*.py"))]
    rooms = {module_of(path): room_of(path, root) for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        tree = ast.parse((root / path).read_text("utf-8"))
        own, targets = rooms[module_of(path)], {rooms[name] for name in imported(tree, set(rooms))}
        if len(tree.body) > 1 or path.name != "__init__.py":
            graph.setdefault(own, set()).update(targets - {own})
    return {room: {target for target in targets if target in graph} for room, targets in graph.items()}


def reached(graph: dict[str, set[str]], room: str) -> set[str]:
    """All rooms below one, itself among them where it is in a circle."""
    found: set[str] = set()
    left = list(graph[room])
    while left:
        if (target := left.pop()) not in found:
            found.add(target)
            left += graph[target]
    return found


def floors(graph: dict[str, set[str]]) -> int:
    """The longest chain of rooms, each above the next."""
    below = {room: reached(graph, room) for room in graph}
    height: dict[str, int] = {}
    for room in sorted(graph, key=lambda each: (len(below[each]), each not in below[each])):
        lower = [other for other in below[room] if room not in below[other]]
        height[room] = 1 + max((height[other] for other in lower), default=0)
    return max(height.values())


def main() -> None:
    """Print the counts."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    graph = arrows_between_rooms(root)
    both = sum(room in graph[target] for room, targets in graph.items() for target in targets) // 2
    count = sum(map(len, graph.values()))
    print(f"{len(graph)} rooms, {floors(graph)} floors, {count} arrows, {both} pairs that import each other")


if __name__ == "__main__":
    main()
