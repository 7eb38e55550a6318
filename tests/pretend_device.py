"""A device that is not the CPU, made of host memory: for finding on any machine what would fail on a GPU.

Its tensors are plain ones of torch's spare device type, `PrivateUse1`, here called "pretend". One fallback computes every
operation on the CPU, after the check that CUDA makes: tensors of different devices don't mix. Copies to the host are
counted, and one that is not waited for shows its numbers only after the device's next stop.
"""

import ctypes
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU, OTHER = 1, 12
"""DLPack's numbers of the two devices."""
MIXED = "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu!"


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _Header(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabelled(tensor: Tensor, device: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    header = _Header.from_address(_pointer(capsule, b"dltensor"))
    header.device.type, header.device.id = device, 0
    return torch._C._from_dlpack(capsule)


def on_host(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the pretend device as one of the CPU."""
    values = _relabelled(tensor, CPU)
    return values.conj() if tensor.is_conj() else values


def is_pretend(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


@dataclass(frozen=True)
class Event:
    """Of the device's log: a stop of the host, "late" for a copy that it doesn't wait for, or "random", and where."""

    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind} in {self.place}"


LOG: list[Event] = []
_late: list[tuple[Tensor, Tensor]] = []


def note(kind: str) -> None:
    """Enter an event, with the innermost file and function of the product that are on the stack."""
    place = "the tests"
    for frame, _ in traceback.walk_stack(sys._getframe()):
        _, inside, path = frame.f_code.co_filename.partition("/rtdmd_cli/")
        if inside:
            place = f"{path}, {frame.f_code.co_name}"
            break
    LOG.append(Event(kind, place))


def wait() -> None:
    """Let the host stop until all work is done, late copies too."""
    note("wait")
    _arrive()


def _arrive() -> None:
    for target, values in _late:
        target.copy_(values)
    _late.clear()


STOPPING = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "_local_scalar_dense",
}
"""Operations whose result the host has to see before it goes on; so is an index by a mask."""
RANDOM = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "bernoulli",
    "random_",
    "exponential_",
    "native_dropout",
    "randperm",
    "multinomial",
    "normal",
    "rrelu_with_noise",
}
HOST_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""What takes indices from the CPU."""
DENSE = ("native_group_norm", "native_group_norm_backward")
"""What torch gives a spare device as it is, and the CPU only in one piece."""
PRODUCTS = ("linear", "matmul", "bmm", "conv2d", "conv3d", "scaled_dot_product_attention")
"""What autocast computes in its format."""
LISTS = {"cat", "stack"}
"""What takes no tensor of the CPU, not even one without dimensions."""


@dataclass(frozen=True)
class Known:
    """Of an operation: its short name, the places of the arguments that it writes to, and of those that are tensors."""

    name: str
    written: tuple[int, ...]
    tensors: tuple[int, ...]


@cache
def _known(op: Any) -> Known:
    arguments = op._schema.arguments
    written = [i for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write]
    tensors = [i for i, each in enumerate(arguments) if str(each.type) == "Tensor"]
    return Known(op._schema.name.partition("::")[2], tuple(written), tuple(tensors))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(each, change) for each in value)
    return change(value)


def _check(op: Any, args: Any, kwargs: Any) -> None:
    """As CUDA's kernels: a tensor of the CPU only where it has no dimensions, or as an index; never to write into."""
    known = _known(op)
    strict = known.name in LISTS or known.name.startswith("_fused")
    read = args[:1] + args[2:] if known.name in HOST_INDEX else args
    foreign = [x for x in _tensors((*read, *kwargs.values())) if x.device.type != NAME]
    into = _tensors(args[i] for i in known.written if i < len(args))
    if any(x.dim() > 0 or strict for x in foreign) or any(x.device.type != NAME for x in into):
        shapes = [(tuple(x.shape), str(x.device)) for x in _tensors((*args, *kwargs.values()))][:8]
        raise RuntimeError(f"{MIXED} ({op}, {shapes})")


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation, computed in host memory."""
    name = _known(op).name
    _check(op, args, kwargs)
    if name in STOPPING or (name in HOST_INDEX and _has_mask(args[1])):
        note(name)
        _arrive()
    if name in RANDOM:
        note("random")
    given: dict[int, Tensor] = {}

    def lower(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type == NAME:
            host = on_host(x) if x.numel() else torch.empty(x.shape, dtype=x.dtype)  # which may be resized
            host = host.contiguous() if name in DENSE else host
            given[id(host)] = x
            return host
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    def lift(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in given:
            return _relabelled(x, OTHER)
        same = given[id(x)]
        if same.shape != x.shape:
            same.data = _relabelled(x, OTHER)
        return same

    low = [_mapped(x, lower) for x in args]
    if any(isinstance(low[i], int | float) for i in _known(op).tensors if i < len(low)):
        op = op.overloadpacket  # a number of Python's came as one, whatever the signature says
    return _mapped(op(*low, **{key: _mapped(x, lower) for key, x in kwargs.items()}), lift)


def _has_mask(indices: Any) -> bool:
    return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(indices))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if is_pretend(target):
        on_host(target).copy_(on_host(source) if is_pretend(source) else source)
    elif non_blocking:
        note("late")
        _late.append((target, on_host(source).clone()))
        _spoil(target)
    else:
        note("copy")
        _arrive()
        target.copy_(on_host(source))
    return target


def _to_copy(source: Tensor, **given: Any) -> Tensor:
    """Torch's own would ask for pinned memory, which this device lacks."""
    kept = {key: given.get(key) for key in ("dtype", "layout", "memory_format")}
    target = torch.empty_like(source, device=given.get("device") or source.device, **kept)
    return target.copy_(source, non_blocking=given.get("non_blocking", False))


def _spoil(target: Tensor) -> None:
    """Fill with what nobody computes."""
    target.fill_(torch.nan if target.is_floating_point() else 1)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):  # type: ignore[no-untyped-def]
    """The plain one; torch has no choice to make for this device."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
    op = torch.ops.aten.convolution.default
    return _fallback(op, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _convolution_backward(gradient, x, weight, *rest):  # type: ignore[no-untyped-def]
    *settings, mask = rest
    sizes = [weight.shape[1] * settings[-1] if settings[3] else weight.shape[0]]
    op = torch.ops.aten.convolution_backward.default
    return _fallback(op, gradient, x, weight, sizes, *settings, mask)


def _autocast(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A product in autocast's format."""
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(here):
        format_ = torch.get_autocast_dtype(NAME)

        def lower(x: Any) -> Any:
            return x.to(format_) if isinstance(x, Tensor) and x.is_floating_point() else x

        return op(*(_mapped(x, lower) for x in args), **{key: _mapped(x, lower) for key, x in kwargs.items()})


class _Module:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_libraries: list[Any] = []


def register() -> torch.device:
    """The device; made once in a process."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(_fallback, "PrivateUse1")
        everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        aten = torch.library.Library("aten", "IMPL")
        for name in PRODUCTS:
            aten.impl(name, partial(_autocast, getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
        aten.impl("_copy_from", _copy_from, "PrivateUse1")
        aten.impl("_copy_from", torch.library.fallthrough_kernel, "Conjugate")
        aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
        aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
        for name in DENSE:
            aten.impl(name, partial(_fallback, getattr(torch.ops.aten, name).default), "PrivateUse1")
        aten.impl("_to_copy", _to_copy, "PrivateUse1")
        aten.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
        aten.impl("scaled_dot_product_attention", _attention, "PrivateUse1")
        _libraries.extend([everything, aten])
    return torch.device(NAME)
