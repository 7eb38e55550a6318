"""Write what `rtdmd plan` says into the headers of the presets for one card.

PYTHONPATH=. python -m scripts.plan_headers [NAME ...]      by default every -24gb, -16gb and -overnight preset
"""

from __future__ import annotations

import re
import sys

from rtdmd_cli.config.loader import list_presets, load_preset
from rtdmd_cli.engine.planning.plan import STAGES, make_plan

GPU = "4090"
LINES = re.compile(
    r"# Planned, not measured \(rtdmd plan.*\n# host .*\n|# Memory: not (?:measured|planned) yet\.\n"
)


def main(names: list[str]) -> None:
    """One line on stdout for each preset that was written."""
    for info in list_presets():
        if info.name not in names and (names or not info.name.endswith(("-24gb", "-16gb", "-overnight"))):
            continue
        found = make_plan(load_preset(info.name, [], {}).preset, STAGES, GPU).figures()
        before, after = LINES.split(info.path.read_text(encoding="utf-8"), maxsplit=1)
        info.path.write_text(before + header(found) + after, encoding="utf-8")
        print(info.name, found["card_peak_gib"], found["hours"])


def header(found: dict[str, object]) -> str:
    """Two lines from `Plan.figures`."""
    stages = found["stages"]
    assert isinstance(stages, dict)
    first, second = (stages[name] for name in STAGES)
    return (
        f"# Planned, not measured (rtdmd plan --gpu {GPU}): card {first['card_peak_gib']:.1f} GiB in stage 1 and "
        f"{second['card_peak_gib']:.1f} in stage 2 ({found['decides']}),\n"
        f"# host {found['host_peak_gib']:.1f} GiB, disk {found['disk_gib']:.0f} GiB; "
        f"{first['hours']:.1f} + {second['hours']:.1f} hours on an RTX {GPU}.\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
