"""How each method is called and drawn: everywhere the same name, colour, marker and dash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from markupsafe import Markup

from llmdoctor.bench.methods import CONTENDERS, DOCTOR
from llmdoctor.evaluation.plot import marker

_COLOURS = {
    "teal": ("#00796b", "#3fd0bb"),
    "vermillion": ("#c8500a", "#ff8d52"),
    "blue": ("#2a62c4", "#7fabff"),
    "purple": ("#93399b", "#dc90e3"),
    "gold": ("#8c6800", "#e0b63c"),
    "sky": ("#0d77ab", "#63c3f0"),
    "rose": ("#c2345f", "#ff86a2"),
    "brown": ("#7d4f38", "#cc9d7e"),
    "olive": ("#62731a", "#b5ca60"),
    "grey": ("#6a717a", "#a6aeb6"),
    "ink": ("#22262b", "#e6e4e0"),
}
"""On light and on dark paper. Where two are close for the colour-blind, markers and dashes differ."""

SERIES_CSS = """
svg .line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .line.strong { stroke-width: 3.4; } svg .line.dashed { stroke-dasharray: 7 4; } svg .line.dotted { stroke-dasharray: 2 4; }
svg .range { stroke: currentColor; stroke-width: 1.3; opacity: .5; } svg .range.strong { stroke-width: 2; opacity: .75; }
svg .point { fill: currentColor; stroke: currentColor; stroke-width: 1.7; stroke-linejoin: round; }
svg .point.hollow { fill: var(--card, #fff); } svg .point.faint { opacity: .45; } svg .range.faint { stroke-width: 1.2; opacity: .4; }
svg .area { fill: currentColor; opacity: .13; stroke: none; }
svg .name { fill: currentColor; font-weight: 600; } svg .row { fill: var(--ink, #22262b); } svg .row.strong { font-weight: 600; }
svg .centre { stroke: var(--soft, #5f6770); stroke-width: 1; }
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Look:
    """Name and drawing of one method.

    Attributes:
        name: short, for charts.
        title: long, for tables.
        arxiv: number of the paper, or nothing.
        colour: of `_COLOURS`.
        marker: of `plot.MARKERS`.
        hollow: the marker is an outline.
        dash: "", "dashed" or "dotted".
        strong: it stands out.
    """

    name: str
    title: str
    arxiv: str
    colour: str
    marker: str
    hollow: bool = False
    dash: str = ""
    strong: bool = False

    @property
    def css(self) -> str:
        """Class that sets the colour."""
        return f"c-{self.colour}"

    def classes(self, part: str) -> str:
        """Classes of a part of the drawing: "line", "range", "point", "area" or "name"."""
        extra = {"line": self.dash, "point": "hollow" if self.hollow else ""}.get(part, "")
        return " ".join(filter(None, [part, self.css, extra, "strong" if self.strong else ""]))

    def swatch(self, x: float = 0, y: float = 0) -> Markup:
        """A small picture of line and marker, for a key."""
        return Markup(
            '<svg class="swatch-line" x="{}" y="{}" width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">'
            '<line class="{}" x1="1" y1="7" x2="29" y2="7"/>{}</svg>'
        ).format(x, y, self.classes("line"), marker(self.classes("point"), self.marker, 15, 7, 4.2, self.name))


_DRAWN: Mapping[str, Look] = {
    DOCTOR: Look("LLMdoctor", "", "", "teal", "circle", strong=True),
    "llmdoctor_rounds": Look("LLMdoctor, rounds", "", "", "teal", "star", hollow=True, dash="dashed"),
    "llmdoctor_pairs": Look("LLMdoctor, pairs", "", "", "teal", "up", hollow=True, dash="dotted"),
    "llmdoctor_labels": Look("LLMdoctor, labels", "", "", "teal", "down", hollow=True, dash="dotted"),
    "llmdoctor_subtb": Look("LLMdoctor, rounds and pairs", "", "", "teal", "plus", hollow=True, dash="dashed"),
    "llmdoctor_onset": Look("LLMdoctor, growing β", "", "", "teal", "diamond", hollow=True, dash="dashed"),
    "llmdoctor_alpha": Look("LLMdoctor, other α", "", "", "teal", "square", hollow=True, dash="dashed"),
    "llmdoctor_product": Look("LLMdoctor, product", "", "", "teal", "circle", hollow=True, dash="dashed"),
    "llmdoctor_best": Look("LLMdoctor, best of 4", "", "", "teal", "hexagon", dash="dashed"),
    "patient": Look("patient", "", "", "ink", "circle", hollow=True),
    "greedy": Look("greedy", "", "", "grey", "square", hollow=True),
    "temperature": Look("temperature 0.7", "", "", "grey", "diamond", hollow=True),
    "top_k": Look("top-k", "", "", "grey", "up", hollow=True),
    "top_p": Look("top-p", "", "", "grey", "down", hollow=True),
    "contrastive": Look("contrastive search", "", "", "grey", "cross"),
    "best_of_n": Look("best-of-n", "", "", "gold", "down"),
    "readout_best": Look("best-of-n by read-out", "", "", "gold", "down", hollow=True, dash="dashed"),
    "readout": Look("read-out", "read-out of the patient's states (no guide)", "", "gold", "down", hollow=True),
    "args": Look("ARGS, greedy", "", "", "sky", "plus"),
    "args_stochastic": Look("ARGS, stochastic", "", "", "sky", "star", dash="dashed"),
    "cards": Look("CARDS", "", "", "brown", "hexagon"),
    "transfer_q": Look("Transfer-Q*", "", "", "olive", "hexagon", hollow=True),
    "genarm": Look("GenARM", "", "", "blue", "up"),
    "faces": Look("two faces", "", "", "purple", "diamond", dash="dotted"),
    "dpo": Look("DPO", "", "", "vermillion", "square"),
    "dpo_best": Look("DPO, best of 4", "", "", "vermillion", "plus", dash="dotted"),
    "llmdoctor_merged": Look(
        "LLMdoctor, merged", "LLMdoctor, two doctors merged", "", "teal", "star", dash="dashed", strong=True
    ),
    "reward_soup": Look("Reward Soup", "Reward Soup of DPO policies", "2306.04488", "gold", "diamond", dash="dashed"),
    "mod": Look("MOD", "MOD of DPO policies", "2406.18853", "rose", "up", hollow=True, dash="dotted"),
    "whole": Look("whole", "LLMdoctor as it is", "", "teal", "circle", strong=True),
    "balanced": Look(
        "rounds and pairs", "rounds and pairs with their token rewards, added up", "", "teal", "plus", dash="dashed"
    ),
    "labels": Look("labels", "trained on the pairs' labels alone", "", "olive", "down", strong=True),
    "no_pairs": Look("rounds", "trained in rounds, not on the pairs", "", "brown", "up", strong=True),
    "no_subtb": Look("no flow balance", "without sub-trajectory balance", "", "vermillion", "square"),
    "no_branch": Look("no branch balance", "without balance between two answers", "", "blue", "up"),
    "online_dpo": Look("online DPO", "DPO in its place, rounds and read-out alike", "", "sky", "star", dash="dashed"),
    "no_rounds": Look("pairs", "trained on the pairs, not in rounds", "", "olive", "hexagon", strong=True),
    "pairs_no_subtb": Look("pairs, no balance", "pairs, without sub-trajectory balance", "", "vermillion", "square"),
    "pairs_no_value": Look("pairs, no value loss", "pairs, without the value loss", "", "blue", "up"),
    "pairs_no_leaf": Look("pairs, no leaf loss", "pairs, without the leaf loss", "", "rose", "plus"),
    "pairs_no_sparsity": Look("pairs, no sparsity", "pairs, without sparsity (θ = 0)", "", "gold", "diamond"),
    "pairs_no_flow": Look("pairs, no flow", "pairs, without flow (squared error)", "", "purple", "down", dash="dashed"),
    "no_flow": Look("no flow", "without flow (squared error)", "", "purple", "down", dash="dashed"),
    "pairs_no_anchor": Look(
        "pairs, no anchor", "pairs, without anchors (as the paper writes it)", "", "brown", "cross", dash="dotted"
    ),
}
_ARXIV = "arXiv "


def look(method: str) -> Look:
    """The look of a method or ablation variant; one that is not known here is grey and called what it is called."""
    found = _DRAWN.get(method, Look(method.replace("_", " "), "", "", "rose", "star", dash="dotted"))
    contender = CONTENDERS.get(method)
    if contender is None:
        return replace(found, title=found.title or found.name)
    return replace(found, title=contender.title, arxiv=contender.source.partition(_ARXIV)[2])


def colours_css(dark: bool) -> str:
    """Rules that set the colours."""
    return " ".join(f".c-{name} {{ color: {pair[dark]}; }}" for name, pair in _COLOURS.items())


_SYMBOLS = {"beta": "β", "alpha": "α", "temperature": "T", "share": "first task's share"}


def setting_text(setting: Mapping[str, float]) -> str:
    """A setting as people write it; empty for a method that has none."""
    return ", ".join(f"{_SYMBOLS.get(name, name)} = {value:g}" for name, value in setting.items())
