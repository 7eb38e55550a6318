import gc
import os
import sys
from types import ModuleType

import pytest
import torch

from rtdmd_cli.engine.compute.importing import NO_COMPILER, quick_imports


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_inside_nothing_is_compiled_and_nothing_collected() -> None:
    with quick_imports():
        assert torch.compile(double) is double
        assert not gc.isenabled()
    assert torch.compile(double) is not double
    assert gc.isenabled()


def test_what_is_there_already_is_left_to_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be: without an import nothing is frozen."""
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    with quick_imports():
        pass
    assert not frozen
    with monkeypatch.context() as patch, quick_imports():
        patch.setitem(sys.modules, "a module that is new", ModuleType("new"))
    assert frozen


@pytest.mark.parametrize("before", [None, "0"])
def test_all_is_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv(NO_COMPILER, raising=False)
    else:
        monkeypatch.setenv(NO_COMPILER, before)
    with pytest.raises(ImportError), quick_imports():
        raise ImportError
    assert os.environ.get(NO_COMPILER) == before
    assert gc.isenabled()
