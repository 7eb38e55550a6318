"""The figures of `rtdmd plan` that a preset for one card states in its header, between its comments."""

from __future__ import annotations

import re
from dataclasses import dataclass

GPU = "4090"
"""The card whose rate gives the hours."""
SPARE = 0.08
"""Share of the card's memory that is left free: the allocator loses some to fragments."""
LINES = re.compile(
    rf"# Planned, not measured \(rtdmd plan --gpu {GPU}\): card (?P<first>[\d.]+) GiB in stage 1 and "
    r"(?P<second>[\d.]+) in stage 2 \((?P<decides>[^)]+)\),\n"
    r"# host (?P<host>[\d.]+) GiB, disk (?P<disk>\d+) GiB; (?P<hours_1>[\d.]+) \+ (?P<hours_2>[\d.]+) "
    rf"hours on an RTX {GPU}\.\n"
)


@dataclass(frozen=True)
class Planned:
    """What a header states. card: GiB in stage 1 and in stage 2; host, disk: GiB; hours: of both stages on an RTX 4090;
    decides: the stage and phase with the card's peak."""

    card: tuple[float, float]
    decides: str
    host: float
    disk: float
    hours: tuple[float, float]

    @property
    def peak(self) -> float:
        """GiB on the card in the stage that takes more."""
        return max(self.card)

    def __str__(self) -> str:
        return f"{self.peak:.1f} GiB, {sum(self.hours):,.0f} h on an RTX {GPU}"

    def fits(self, card: float) -> bool:
        """Whether a card of so many GiB has SPARE left."""
        return self.peak <= card * (1 - SPARE)

    def lines(self) -> str:
        """The header's two lines."""
        return (
            f"# Planned, not measured (rtdmd plan --gpu {GPU}): card {self.card[0]:.1f} GiB in stage 1 and "
            f"{self.card[1]:.1f} in stage 2 ({self.decides}),\n"
            f"# host {self.host:.1f} GiB, disk {self.disk:.0f} GiB; "
            f"{self.hours[0]:.1f} + {self.hours[1]:.1f} hours on an RTX {GPU}.\n"
        )


def planned(text: str) -> Planned | None:
    """The figures in a preset's text; None where its header states none."""
    found = LINES.search(text)
    if found is None:
        return None
    return Planned(
        (float(found["first"]), float(found["second"])),
        found["decides"],
        float(found["host"]),
        float(found["disk"]),
        (float(found["hours_1"]), float(found["hours_2"])),
    )
