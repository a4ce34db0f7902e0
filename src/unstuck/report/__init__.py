"""Shows results: the verdict on a terminal, one self-contained HTML page, and a picture of any result."""

from unstuck.report._draw import draw, draw_run
from unstuck.report._page import page
from unstuck.report._screen import screen

__all__ = ["draw", "draw_run", "page", "screen"]
