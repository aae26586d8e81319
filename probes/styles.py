"""How figures look: sizes, and colors that are told apart and stand out on light pages and dark ones alike."""

from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 5.4
"""Inches: about as wide as pages show figures, so that 10 pt is legible, on a phone too."""

CLASSES = {
    True: {"color": "#2a8f5d", "linestyle": "-", "marker": "o"},
    False: {"color": "#cf5340", "linestyle": "--", "marker": "X"},
}
"""How the classes of a binary label look: told apart by shape as well as by color."""

COLORS = ("#2f74d0", "#c26a00", "#2a8f5d", "#9b58b5", "#cf5340", "#6b7a89", "#8f7f00", "#00919c")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE = "#808080"
"""Reference lines. All these colors have a contrast of at least 3 to 1 against both themes' backgrounds."""

DARK_INK = "#e4e7eb"
DPI = 160
LEGEND_CHARACTERS = 70
"""Of all labels in a row of a legend below a figure, at most."""

TITLE_CHARACTERS = 62


def darken(figure: Figure) -> Figure:
    """Give a figure light ink and no background, for pages in a dark color scheme; return it.

    Its layout stays as it is; lines and points keep their colors, which are made for both.
    """
    figure.set_layout_engine("none")
    figure.patch.set_alpha(0)
    for text in figure.findobj(Text):
        text.set_color(DARK_INK)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=DARK_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(DARK_INK)
    return figure
