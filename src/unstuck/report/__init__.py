"""Shows results: the verdict and a point on a terminal, one self-contained HTML page, and a picture of any result."""

from unstuck.report._draw import draw, draw_run
from unstuck.report._page import page
from unstuck.report._point import point_table
from unstuck.report._screen import screen

__all__ = ["draw", "draw_run", "page", "point_table", "screen"]
