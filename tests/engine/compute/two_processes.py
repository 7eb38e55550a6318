"""Run in two processes by `tests/cli/test_processes.py`: each prints one line if all is right."""

import torch
from torch.nn import Parameter

from rtdmd_cli.engine.compute import processes as module
from rtdmd_cli.engine.compute.processes import join, require_parts
from rtdmd_cli.errors import NumericalError, RtdmdError, UsageError


def main() -> int:
    """Everything that processes do together."""
    processes, device = join(torch.device("cpu"))
    number = processes.index
    assert (processes.count, device.type, processes.main) == (2, "cpu", number == 0)
    assert list(processes.part(5)) == ([0, 1] if number == 0 else [2, 3, 4])
    module.BUCKET = 4
    parameters = [Parameter(torch.zeros(3)), Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(1))]
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    processes.sum_gradients(parameters)
    assert all(bool((p.grad == 3.0).all()) for p in parameters[:2] if p.grad is not None)
    assert parameters[2].grad is None
    assert processes.sum_figures({"b": 1.0 + number, "a": 0.5}) == {"a": 1.0, "b": 3.0}
    rows = torch.full((2, 3), float(number))
    assert processes.gather(rows).tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert processes.largest(7 * number) == 7
    with processes.agreeing():
        pass
    try:
        require_parts(processes, "batch", 5, equal=True)
    except UsageError:
        require_parts(processes, "batch", 5, equal=False)
    text = ""
    try:
        with processes.agreeing():
            if number == 1:
                raise NumericalError("a loss is nan")
    except NumericalError as error:
        text = f"stopped with {error.exit_code}"
    except RtdmdError as error:
        text = f"other stopped with {error.exit_code}"
    print(f"process {number}: all right, {text}")
    return 0
