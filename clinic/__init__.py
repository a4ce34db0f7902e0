"""The fault suite: ordinary trainings, the errors that users make in them, and healthy runs that look odd."""
