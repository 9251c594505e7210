"""One setting for all tests: runs are reproducible, and no test asserts a time."""

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
