"""Write what `rtdmd plan` says into the headers of the presets for one card.

PYTHONPATH=. python -m scripts.plan_headers [NAME ...]      by default every -24gb, -16gb and -overnight preset
"""

from __future__ import annotations

import re
import sys

from rtdmd_cli.config.loader import list_presets, load_preset
from rtdmd_cli.config.planned import GPU, LINES, Planned
from rtdmd_cli.engine.planning.plan import STAGES, Plan, make_plan

UNPLANNED = re.compile(r"# Memory: not (?:measured|planned) yet\.\n")


def main(names: list[str]) -> None:
    """One line on stdout for each preset that was written."""
    for info in list_presets():
        if info.name not in names and (names or not info.name.endswith(("-24gb", "-16gb", "-overnight"))):
            continue
        found = figures(make_plan(load_preset(info.name, [], {}).preset, STAGES, GPU))
        text = info.path.read_text(encoding="utf-8")
        place = LINES.search(text) or UNPLANNED.search(text)
        if place is None:
            sys.exit(f"{info.path} has no place for a plan: put in '# Memory: not planned yet.'")
        info.path.write_text(text[: place.start()] + found.lines() + text[place.end() :], encoding="utf-8")
        print(info.name, found.card, found.hours, flush=True)


def figures(plan: Plan) -> Planned:
    """What a header states of a plan of both stages."""
    found = plan.figures()
    first, second = (found["stages"][name] for name in STAGES)
    return Planned(
        (first["card_peak_gib"], second["card_peak_gib"]),
        found["decides"],
        found["host_peak_gib"],
        found["disk_gib"],
        (first["hours"], second["hours"]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
