"""Disks that fail, interrupt, and remember: what the program's `disk` is replaced by."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdmd_cli.engine.storage.disk import Disk
from scripts.torture.disks import HookedDisk


class FailingDisk(HookedDisk):
    """The `call`-th call raises OSError, a write after half of its data; later ones work again unless `stays`."""

    def __init__(self, call: int, number: int, stays: bool = False) -> None:
        self.call, self.number, self.stays, self.count, self.failed = call, number, stays, 0, False

    def before(self, name: str) -> None:
        self.count += 1
        if self.fails(name) and name != "write":
            self.fail()

    def fails(self, name: str) -> bool:
        """Whether the call that is made now does."""
        again = self.stays and self.count > self.call and name in ("create", "write")
        return self.count == self.call or again

    def fail(self) -> None:
        self.failed = True
        raise OSError(self.number, os.strerror(self.number))

    def write(self, descriptor: int, data: bytes) -> None:
        if self.fails("write"):
            super().write(descriptor, data[: len(data) // 2])
            self.fail()
        super().write(descriptor, data)


class ActingDisk(HookedDisk):
    """Calls `act` in front of each of the given calls."""

    def __init__(self, calls: Sequence[int], act: Callable[[], None]) -> None:
        self.calls, self.act, self.count = frozenset(calls), act, 0

    def before(self, name: str) -> None:
        self.count += 1
        if self.count in self.calls:
            self.act()


@dataclass
class Node:
    """A file or folder as the recorded disk knows it. names: of a folder, name -> number of a node."""

    content: bytes = b""
    names: dict[str, int] | None = None


@dataclass(frozen=True)
class Names:
    """An operation on names: in folder, name, node (None: removed), all at once."""

    entries: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Content:
    """An operation on a file: its whole content from now on."""

    node: int
    content: bytes


@dataclass(frozen=True)
class Flush:
    """What was done to this node before is on the disk."""

    node: int


Operation = Names | Content | Flush


@dataclass
class RecordingDisk(Disk):
    """Works as a disk does and writes down what each call did to the tree under `root`."""

    root: Path
    start: dict[int, Node] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    log: list[Operation] = field(default_factory=list)
    opened: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scan(self.root)
        self.start = {number: _copy(node) for number, node in self.nodes.items()}

    def _scan(self, path: Path) -> int:
        number = len(self.nodes)
        self.nodes[number] = node = Node()
        if path.is_dir():
            node.names = {}
            for child in sorted(path.iterdir()):
                node.names[child.name] = self._scan(child)
        else:
            node.content = path.read_bytes()
        return number

    def _find(self, path: Path) -> int | None:
        number = 0
        for part in Path(os.path.abspath(path)).relative_to(self.root).parts:
            names = self.nodes[number].names
            if names is None or part not in names:
                return None
            number = names[part]
        return number

    def _do(self, operation: Operation) -> None:
        self.log.append(operation)
        apply(self.nodes, operation)

    def _entry(self, path: Path, node: int | None) -> tuple[int, str, int | None]:
        folder = self._find(path.parent)
        assert folder is not None, path
        return folder, path.name, node

    def _new(self, path: Path, node: Node) -> int:
        number = len(self.nodes)
        self.nodes[number] = node
        self.start[number] = Node(names={}) if node.names is not None else Node()
        self._do(Names((self._entry(path, number),)))
        return number

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self.opened[descriptor] = self._new(path, Node())
        return descriptor

    def open_to_append(self, path: Path) -> int:
        descriptor = super().open_to_append(path)
        found = self._find(path)
        self.opened[descriptor] = self._new(path, Node()) if found is None else found
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        super().write(descriptor, data)
        node = self.opened[descriptor]
        self._do(Content(node, self.nodes[node].content + bytes(data)))

    def truncate(self, descriptor: int, size: int) -> None:
        super().truncate(descriptor, size)
        node = self.opened[descriptor]
        self._do(Content(node, self.nodes[node].content[:size]))

    def flush(self, descriptor: int) -> None:
        super().flush(descriptor)
        self._do(Flush(self.opened[descriptor]))

    def flush_path(self, path: Path) -> None:
        super().flush_path(path)
        node = self._find(path)
        if path.is_file():  # a library may have written it by itself
            node = self._new(path, Node()) if node is None else node
            if self.nodes[node].content != path.read_bytes():
                self._do(Content(node, path.read_bytes()))
        assert node is not None, path
        self._do(Flush(node))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        if self._find(path) is None:
            self._new(path, Node(names={}))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self._rename(source, target)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._rename(source, target)

    def _rename(self, source: Path, target: Path) -> None:
        node = self._find(source)
        self._do(Names((self._entry(source, None), self._entry(target, node))))

    def exchange(self, one: Path, other: Path) -> bool:
        done = super().exchange(one, other)
        first, second = self._find(one), self._find(other)
        if done:
            self._do(Names((self._entry(one, second), self._entry(other, first))))
        return done

    def remove_file(self, path: Path) -> None:
        super().remove_file(path)
        self._do(Names((self._entry(path, None),)))

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        self._do(Names((self._entry(path, None),)))


def _copy(node: Node) -> Node:
    return Node(node.content, None if node.names is None else dict(node.names))


def apply(nodes: dict[int, Node], operation: Operation) -> None:
    """Do to the nodes what the operation did."""
    if isinstance(operation, Content):
        nodes[operation.node].content = operation.content
    elif isinstance(operation, Names):
        for folder, name, node in operation.entries:
            names = nodes[folder].names
            assert names is not None
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node


def touched(operation: Operation) -> set[int]:
    """The nodes whose flush brings the operation to the disk."""
    if isinstance(operation, Names):
        return {folder for folder, _, _ in operation.entries}
    return {operation.node}


def after_crash(disk: RecordingDisk, moment: int, forgotten: float, draw: random.Random) -> dict[int, Node]:
    """What lies on the disk where the power goes after `moment` operations.

    forgotten: the chance of each operation that was not flushed to be lost, whatever came after it; a content that is
    lost may be there in half.
    """
    nodes = {number: _copy(node) for number, node in disk.start.items()}
    for place, operation in enumerate(disk.log[:moment]):
        later = disk.log[place + 1 : moment]
        safe = any(isinstance(each, Flush) and each.node in touched(operation) for each in later)
        if safe or draw.random() >= forgotten:
            apply(nodes, operation)
        elif isinstance(operation, Content) and draw.random() < 0.5:
            apply(nodes, Content(operation.node, operation.content[: len(operation.content) // 2]))
    return nodes


def lay_out(nodes: dict[int, Node], folder: Path, number: int = 0) -> None:
    """Write the tree to `folder`, which must not exist."""
    names = nodes[number].names
    if names is None:
        folder.write_bytes(nodes[number].content)
        return
    folder.mkdir()
    for name, child in names.items():
        lay_out(nodes, folder / name, child)


def moments(disk: RecordingDisk) -> Iterator[int]:
    """After every operation that changed something, and before the first."""
    yield 0
    for place, operation in enumerate(disk.log):
        if not isinstance(operation, Flush):
            yield place + 1


def calls(disk: Any) -> int:
    """How many calls a hooked disk has seen."""
    return int(disk.count)
