"""A small DVC project."""

from dvc_project import project, template  # noqa: F401
