"""The places of the figures: headings, captions and the frames that the script draws into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnlight.compare.page.markup import attributes, text
from bnlight.compare.page.plan import Figure, Section

_BANDS = (("interval", "95 % interval"), ("range", "lowest to highest"), ("seeds", "every seed"))
_SHOWN = 6  # figures in a row that are not folded


class Pictures:
    """Hands out frames; `specs` collects what the script needs to fill them, in the same order."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def sections(self, sections: Sequence[Section]) -> str:
        """All sections under one legend that stays in sight."""
        if not sections:
            return ""
        legend = '<div class="legend" role="group" aria-label="Show or hide in all figures"></div>'
        parts = "\n".join(map(self._section, sections))
        return f'<section class="pictures">\n{legend}\n{parts}\n</section>'

    def frames(self, figures: Sequence[Figure]) -> str:
        """The frames of `figures`, side by side where there is room; of many, all but the first start folded."""
        frames = [self._frame(figure) for figure in figures]
        first, rest = frames[:_SHOWN], frames[_SHOWN:]
        more = f"<details><summary>{len(rest)} more figures</summary>\n{_side_by_side(rest)}</details>\n"
        return (_side_by_side(first) if first else "") + (more if rest else "")

    def _section(self, section: Section) -> str:
        parts = [f'<h2>{text(section.title)}</h2>\n<p class="soft">{text(section.note)}</p>']
        if any(figure.kind == "curves" for _, figures in section.groups for figure in figures):
            parts.append(_bands())
        for number, (name, figures) in enumerate(section.groups):
            frames = self.frames(figures)
            opened = " open" if number < section.opened else ""
            title = text(name[:1].upper() + name[1:])
            folded = f'<details class="group"{opened}><summary>{title}</summary>\n{frames}</details>'
            parts.append(folded if name else frames)
        return "\n".join(parts)

    def _frame(self, figure: Figure) -> str:
        number = len(self.specs)
        self.specs.append(figure.spec)
        return (
            f'<figure{" class=wide" if figure.wide else ""} data-figure="{number}"><figcaption>{text(figure.title)}'
            f'</figcaption><div class="chart" role="img" aria-label="{text(figure.label)}"></div></figure>'
        )


def _side_by_side(frames: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(frames)}</div>\n'


def _bands() -> str:
    radios = [
        (attributes({"type": "radio", "name": "band", "value": value, "checked": value == "interval"}), words)
        for value, words in _BANDS
    ]
    choices = "".join(f"<label><input{radio}>{words}</label>" for radio, words in radios)
    return f'<fieldset class="bands"><legend>Band</legend>{choices}</fieldset>'
