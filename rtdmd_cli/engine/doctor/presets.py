"""Which shipped presets fit this card, by the figures in their headers."""

import torch

from rtdmd_cli.config.loader import list_presets
from rtdmd_cli.config.planned import Planned
from rtdmd_cli.engine.compute.host import GIB
from rtdmd_cli.engine.doctor.check import Check


def stated() -> dict[str, Planned]:
    """The shipped presets of published models, those that take least of a card first."""
    known = {info.name: info.planned for info in list_presets() if info.planned}
    return dict(sorted(known.items(), key=lambda item: item[1].peak))


def card_memory() -> float | None:
    """GiB of the card that `--device auto` takes; None without one."""
    return torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else None


def fitting() -> Check:
    """Those that fit, and the others with what they take."""
    card, known = card_memory(), stated()
    fits = {name: card is not None and figures.fits(card) for name, figures in known.items()}
    facts = {name: {"card_gib": figures.peak, "fits": fits[name]} for name, figures in known.items()}
    if card is None:
        first, smallest = next(iter(known.items()))
        found = f"without a card, those of the built-in model; {first} takes {smallest.peak:.1f} GiB of one"
        return Check("presets", "WARN", found, "Any other model: rtdmd plan --preset NAME --gpu CARD", facts)
    there = ", ".join(name for name in known if fits[name]) or "none"
    rest = ", ".join(f"{name} ({known[name].peak:.1f} GiB)" for name in known if not fits[name])
    found = f"by plan on {card:.1f} GiB: {there}" + (f"; too large: {rest}" if rest else "")
    if any(fits.values()):
        return Check("presets", "PASS", found, facts=facts)
    fix = f"See what can be given up: rtdmd plan --preset {next(iter(known))} --fit --vram {card:.0f}"
    return Check("presets", "WARN", found, fix, facts)
