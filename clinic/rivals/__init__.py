"""Unstuck and the published rivals on the same trainings: python -m clinic.rivals."""
