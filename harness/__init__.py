"""Settings, run folders, reports and command lines: everything that is not in the papers."""
