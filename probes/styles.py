"""The style of figures: sizes, and colors that are distinguishable and visible on light and dark pages."""

from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 5.4
"""Width in inches, about that of figures on pages, so that 10 pt text is legible, also on a phone."""

CLASSES = {
    True: {"color": "#2a8f5d", "linestyle": "-", "marker": "o"},
    False: {"color": "#cf5340", "linestyle": "--", "marker": "X"},
}
"""Style of the classes of a binary label, distinguishable by shape as well as by color."""

COLORS = ("#2f74d0", "#c26a00", "#2a8f5d", "#9b58b5", "#cf5340", "#6b7a89", "#8f7f00", "#00919c")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE = "#808080"
"""Color of reference lines. All colors have a contrast of at least 3 to 1 against both themes' backgrounds."""

DARK_INK = "#e4e7eb"
DPI = 160
LEGEND_CHARACTERS = 70
"""Maximum total characters of the labels in a row of a legend below a figure."""

TITLE_CHARACTERS = 62


def darken(figure: Figure) -> Figure:
    """Switch a figure to light text and no background, for pages in a dark color scheme; return it.

    Its layout is unchanged; lines and points keep their colors, which suit both schemes.
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
