"""Failure handling of a run: number guard, watchdog, launcher watch, signals, incidents."""
