"""Finds out why a neural network stops training, and proves the cure."""

__all__: list[str] = []
