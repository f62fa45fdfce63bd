"""The steps of a run: request, prepare, status, evaluation, serving. No Ray."""
