"""Experiment trackers that the driver tells of every Step, one file each; nothing reads what they write."""
