"""Settings, run folders, reports and command lines: everything that is not in the papers."""
__version__ = "2.0.0"
