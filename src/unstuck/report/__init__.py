"""Shows results on a terminal (also of a run that goes on), on one self-contained HTML page, and as pictures."""

from unstuck.report._draw import draw, draw_run
from unstuck.report._explain import causes, explanation
from unstuck.report._live import LiveScreen
from unstuck.report._page import page
from unstuck.report._point import point_table
from unstuck.report._runs import runs_table
from unstuck.report._screen import screen

__all__ = [
    "LiveScreen",
    "causes",
    "draw",
    "draw_run",
    "explanation",
    "page",
    "point_table",
    "runs_table",
    "screen",
]
